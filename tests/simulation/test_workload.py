"""Loads as they are recorded or drawn, and the tokens that are made up for them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from duetto.core.errors import ConfigError
from duetto.measure.traces import TraceError, TraceFit
from duetto.measure.workload import Lengths, SharedPrefixes
from duetto.simulation.load import TrafficOptions
from duetto.simulation.workload import Arrival, Traffic, read_trace, synthetic

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"
MOONCAKE_ROW = '{{"timestamp": {}, "input_length": {}, "output_length": 9, "hash_ids": {}}}\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "trace"
    file.write_text(text)
    return file


def test_azure_with_seven_fractional_digits(tmp_path: Path) -> None:
    later = ROW.replace("46.6805900", "50.9951690").replace("374", "396")
    load = read_trace(written(tmp_path, HEADER + ROW + later))
    assert [(a.num_prompt_tokens, a.num_output_tokens) for a in load.arrivals] == [
        (374, 44),
        (396, 44),
    ]
    assert load.arrivals[1].arrival_s == pytest.approx(4.314579)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "1: the file is empty"),
        (HEADER, "1: no requests in it"),
        ("TIMESTAMP,ContextTokens\n", "1: no column GeneratedTokens"),
        (HEADER + ROW + ROW.replace("374", "-374"), "3: ContextTokens is '-374'"),
        (HEADER + ROW + ROW.replace(":46", ":45"), "3: its time is 1 s before the row above"),
        (MOONCAKE_ROW.format(5, -1, [1]), "1: input_length is '-1'"),
        (
            MOONCAKE_ROW.format(5, 8, [1]) + "\n" + MOONCAKE_ROW.format(4, 8, [1]),
            "3: its time is 0.001 s before the row above",
        ),
        ('{"timestamp": 5}\n', "1: Object missing required field"),
    ],
)
def test_a_bad_trace_is_told_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_trace(file)
    assert str(caught.value).startswith(str(file))
    assert where in str(caught.value)


def test_a_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")


def test_equal_hashes_are_equal_tokens_and_nothing_else_is(tmp_path: Path) -> None:
    rows = [(1100, [7, 8, 9]), (1024, [7, 8]), (600, [7, 3]), (600, [4, 8])]
    text = "".join(MOONCAKE_ROW.format(0, n, ids) for n, ids in rows)
    load = read_trace(written(tmp_path, text))
    prompts = [load.request(i).prompt_token_ids for i in range(4)]
    assert [len(p) for p in prompts] == [1100, 1024, 600, 600]
    assert prompts[0][:1024] == prompts[1]
    assert prompts[0][:512] == prompts[2][:512]
    assert prompts[0][:513] != prompts[2][:513]  # a block shows at its first token whose it is
    assert prompts[0][0] != prompts[3][0]


def test_without_hashes_no_prompt_is_like_another() -> None:
    load = Traffic((Arrival(0.0, 50, 1), Arrival(0.0, 50, 1), Arrival(0.0, 50, 1, (3,))), 32)
    prompts = [load.request(i).prompt_token_ids for i in range(3)]
    assert len({p[0] for p in prompts}) == 3
    assert prompts[2][32] != 0  # beyond its hash ids it is its own too


def test_a_scaled_trace_still_shares(tmp_path: Path) -> None:
    text = "".join(MOONCAKE_ROW.format(0, n, ids) for n, ids in ((1100, [7, 8, 9]), (600, [7, 3])))
    load = read_trace(written(tmp_path, text), fit=TraceFit(1 / 16))
    prompts = [load.request(i).prompt_token_ids for i in range(2)]
    assert [len(p) for p in prompts] == [32 + 32 + 5, 32 + 6]  # 76 and 88 tokens over 16
    assert prompts[0][:32] == prompts[1][:32]
    assert prompts[0][:33] != prompts[1][:33]


def lengths(load: Traffic) -> list[tuple[int, int]]:
    return [(a.num_prompt_tokens, a.num_output_tokens) for a in load.arrivals]


def drawn(**changes: object) -> Traffic:
    values = {
        "input_lengths": Lengths(100, "lognormal", 0.5),
        "output_lengths": Lengths(20, "uniform", 0.5),
        **changes,
    }
    return synthetic(200, 4.0, **values)  # type: ignore[arg-type]


def test_a_synthetic_load_is_a_function_of_its_seed() -> None:
    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert lengths(drawn(seed=1, burstiness=0.2)) == lengths(drawn(seed=1))
    assert drawn().arrivals[-1].arrival_s == pytest.approx(50)


def test_arrivals_can_be_even_or_bursty() -> None:
    def gaps(load: Traffic) -> list[float]:
        times = [a.arrival_s for a in load.arrivals]
        return [b - a for a, b in pairwise(times)]

    assert gaps(drawn(burstiness=float("inf"))) == pytest.approx([0.25] * 199)
    assert max(gaps(drawn(burstiness=0.1))) > 2 * max(gaps(drawn()))


def test_prefixes_are_shared_by_those_that_drew_the_same() -> None:
    load = drawn(prefixes=SharedPrefixes(64, 2))
    prompts = [load.request(i).prompt_token_ids for i in range(50)]
    assert len({p[:64] for p in prompts}) == 2
    assert len({p[:65] for p in prompts}) == 50


def test_a_faster_load_has_a_higher_rate() -> None:
    load = drawn()
    assert load.faster(2).requests_per_s == pytest.approx(2 * load.requests_per_s)
    with pytest.raises(ConfigError, match="--trace-speed"):
        load.faster(0)


def test_a_load_repeated_goes_on_at_its_rate_and_shares_nothing_with_before() -> None:
    load = drawn(prefixes=SharedPrefixes(64, 2))
    twice = load.repeated(2)
    count = len(load.arrivals)
    assert twice.arrivals[:count] == load.arrivals
    assert lengths(twice) == 2 * lengths(load)
    assert twice.requests_per_s == pytest.approx(load.requests_per_s)
    first, second = (
        {h for a in part for h in a.hash_ids}
        for part in (twice.arrivals[:count], twice.arrivals[count:])
    )
    assert len(first) == len(second) == 2 and not first & second


@pytest.mark.parametrize("arrivals", ["poisson", "uniform"])
@pytest.mark.parametrize("rate", [1e-300, 1e-310])
def test_rates_under_which_nothing_can_be_said(rate: float, arrivals: Any) -> None:
    with pytest.raises(ConfigError, match=r"--request-rate .* within 1e\+09 s"):
        TrafficOptions(request_rate=rate, arrivals=arrivals).load(0)
    with pytest.raises(ConfigError, match="raise --request-rate or --trace-speed"):
        drawn().faster(1e-9)


def test_a_seed_below_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="--seed -1: must be 0 or more"):
        TrafficOptions().load(-1)
    with pytest.raises(ConfigError, match="--seed -1: must be 0 or more"):
        TrafficOptions(arrivals="uniform").load(-1)


def test_a_trace_does_not_begin_before_0(tmp_path: Path) -> None:
    file = written(tmp_path, MOONCAKE_ROW.format(-5, 3, "[1]"))
    with pytest.raises(ConfigError, match=":1: timestamp is -5; accepted: 0 or more"):
        read_trace(file)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, MOONCAKE_ROW.format(0, 3, "[1]"))
    for name in ("trace_speed", "trace_length_scale", "max_input_len"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: needs --trace"):
            TrafficOptions(**{name: 2}).load(0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--random-input-len with --trace"):
        TrafficOptions(trace=file, random_input_len=5).load(0)
    with pytest.raises(ConfigError, match=r"--arrivals with --trace: .* needs --request-rate"):
        TrafficOptions(trace=file, arrivals="uniform").load(0)


def test_options_read_a_trace_or_draw(tmp_path: Path) -> None:
    file = written(tmp_path, HEADER + ROW * 5)
    assert len(TrafficOptions(trace=file).load(0).arrivals) == 5
    assert len(TrafficOptions(trace=file, num_prompts=2).load(0).arrivals) == 2
    timed = TrafficOptions(trace=file, request_rate=2.0, arrivals="uniform").load(0)
    assert [a.arrival_s for a in timed.arrivals] == pytest.approx([0.5, 1, 1.5, 2, 2.5])
    assert lengths(TrafficOptions(num_prompts=3, random_output_len=7).load(0)) == [(1024, 7)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts 0"),
        ({"request_rate": -1.0}, "--request-rate -1"),
        ({"burstiness": 2.0}, "--burstiness with --arrivals poisson"),
        ({"arrivals": "gamma", "burstiness": 0.0}, "--burstiness 0"),
        ({"trace": Path("x"), "trace_length_scale": 0.0}, "--trace-length-scale 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrafficOptions(**options).load(0)  # type: ignore[arg-type]
