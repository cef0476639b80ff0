"""Trace readers: the real formats (a few rows of each), fitting to a small model, bad rows."""

import json
from pathlib import Path

import pytest

from duetto.core.errors import ConfigError
from duetto.measure.traces import TraceError, TraceFit, read_azure, read_mooncake, read_sharegpt
from duetto.measure.workload import Workload

FIXTURES = Path(__file__).parent / "fixtures"
AZURE = FIXTURES / "azure_conv_5.csv"
MOONCAKE = FIXTURES / "mooncake_5.jsonl"
SHAREGPT = FIXTURES / "sharegpt_4.json"


def lengths(workload: Workload) -> list[tuple[int, int]]:
    return [(len(r.prompt_token_ids or ()), r.num_output_tokens) for r in workload.requests]


def words(text: str) -> int:
    return len(text.split())


# --- Azure -------------------------------------------------------------------------------------


def test_azure() -> None:
    made = read_azure(AZURE, vocab_size=50, num_requests=3)
    assert lengths(made) == [(374, 44), (396, 109), (879, 55)]
    # Seven fractional digits: ...46.6805900, 50.9951690, 51.2224670.
    times = [request.arrival_s for request in made.requests]
    assert times == pytest.approx([0.0, 4.314579, 4.541877], abs=1e-6)
    assert all(0 <= token < 50 for r in made.requests for token in r.prompt_token_ids or ())
    assert made.notes == ()


def test_azure_reads_all_without_a_limit() -> None:
    assert len(read_azure(AZURE, vocab_size=50).requests) == 5


def test_azure_cut_to_a_small_model_says_so() -> None:
    made = read_azure(AZURE, vocab_size=50, num_requests=3, fit=TraceFit(0.1, 40, 10))
    assert lengths(made) == [(37, 4), (40, 10), (40, 6)]
    assert made.notes == (
        "lengths are times 0.1",
        "1 of 3 prompts are cut to 40 tokens",  # 40 itself is not above 40
        "1 of 3 outputs are cut to 10 tokens",
    )


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD_ROW = "2023-11-16 18:15:46.6805900,374,44\n"


@pytest.mark.parametrize(
    ("text", "where", "accepted"),
    [
        ("", "1: no column TIMESTAMP", "accepted: a CSV"),
        ("TIMESTAMP,ContextTokens\n", "1: no column GeneratedTokens", "accepted: a CSV"),
        (HEADER, "1: no requests in it", ""),
        (HEADER + GOOD_ROW + "yesterday,1,1\n", "3: TIMESTAMP 'yesterday'", "accepted: 2023-"),
        (HEADER + GOOD_ROW.replace("374", "-1"), "2: ContextTokens is '-1'", "1 or more"),
        (HEADER + GOOD_ROW.replace(",44", ",4.5"), "2: GeneratedTokens is '4.5'", "1 or more"),
        (HEADER + GOOD_ROW.replace(",44", ""), "2: GeneratedTokens is None", "1 or more"),
    ],
)
def test_a_bad_azure_file(tmp_path: Path, text: str, where: str, accepted: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_azure(file, vocab_size=50)
    assert str(caught.value).startswith(str(file))
    assert where in str(caught.value)
    assert accepted in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for read in (read_azure, read_mooncake):
        with pytest.raises(TraceError, match="No such file"):
            read(tmp_path / "none", vocab_size=50)
    with pytest.raises(TraceError, match="No such file"):
        read_sharegpt(tmp_path / "none", count_tokens=words)


# --- Mooncake ----------------------------------------------------------------------------------


def test_mooncake_shares_what_the_hashes_share() -> None:
    made = read_mooncake(MOONCAKE, vocab_size=1000)
    rows = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]
    assert lengths(made) == [(row["input_length"], row["output_length"]) for row in rows]
    assert [r.arrival_s for r in made.requests] == [row["timestamp"] / 1000 for row in rows]
    for one, one_row in zip(made.requests, rows, strict=True):
        for other, other_row in zip(made.requests, rows, strict=True):
            _assert_blocks_agree(one.prompt_token_ids, one_row, other.prompt_token_ids, other_row)


def _assert_blocks_agree(one, one_row, other, other_row) -> None:  # type: ignore[no-untyped-def]
    """Blocks at one index hold the same tokens exactly when they have the same hash id."""
    pairs = zip(one_row["hash_ids"], other_row["hash_ids"], strict=False)
    for index, (one_id, other_id) in enumerate(pairs):
        start, end = index * 512, min((index + 1) * 512, len(one), len(other))
        assert (one[start:end] == other[start:end]) == (one_id == other_id)


def test_mooncake_scaled_still_shares() -> None:
    made = read_mooncake(MOONCAKE, vocab_size=1000, fit=TraceFit(length_scale=1 / 16))
    prompts = [r.prompt_token_ids or () for r in made.requests]
    # The fixture's first block, hash 0, is the same in all; blocks are now of 32 tokens.
    assert len({prompt[:32] for prompt in prompts}) == 1
    assert len({prompt[32:40] for prompt in prompts}) == len(prompts)
    # 13 full blocks of 512 and one of 102 become 13 of 32 and one of round(102 / 16) = 6.
    assert len(prompts[0]) == 13 * 32 + 6


def test_mooncake_cut_keeps_the_beginning() -> None:
    whole = read_mooncake(MOONCAKE, vocab_size=1000)
    cut = read_mooncake(MOONCAKE, vocab_size=1000, fit=TraceFit(max_input_len=700))
    for long, short in zip(whole.requests, cut.requests, strict=True):
        assert short.prompt_token_ids == (long.prompt_token_ids or ())[:700]
    assert cut.notes == ("5 of 5 prompts are cut to 700 tokens",)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"input_length": 0}, "2: input_length is '0'"),
        ({"output_length": "many"}, "2: Expected `int`, got `str` - at `$.output_length`"),
        ({"hash_ids": [1]}, "2: 1 hash_ids for 600 tokens; accepted: 2 numbers"),
        ({"hash_ids": [1, -2]}, "2: 2 hash_ids for 600 tokens; accepted: 2 numbers of 0 or more"),
        ({"timestamp": None}, "2: Expected `float`"),
    ],
)
def test_a_bad_mooncake_row(tmp_path: Path, change: dict[str, object], where: str) -> None:
    good = {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(TraceError) as caught:
        read_mooncake(file, vocab_size=50)
    assert f"{file}:{where}" in str(caught.value)


def test_a_mooncake_line_that_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n{truncated")
    with pytest.raises(TraceError, match=r"trace\.jsonl:2: .*accepted: \{\"timestamp\""):
        read_mooncake(file, vocab_size=50)


# --- ShareGPT ----------------------------------------------------------------------------------


def test_sharegpt_takes_the_first_two_turns() -> None:
    made = read_sharegpt(SHAREGPT, count_tokens=words)
    assert [r.prompt_text for r in made.requests] == [
        "What is a paged key value cache?",
        "Name three sorting algorithms, please.",
    ]
    assert [r.num_output_tokens for r in made.requests] == [15, 6]
    assert made.notes == ("1 conversations are left out: too short or too long",)


def test_sharegpt_limits() -> None:
    one = read_sharegpt(
        SHAREGPT, count_tokens=words, num_requests=1, fit=TraceFit(max_output_len=9)
    )
    assert [r.num_output_tokens for r in one.requests] == [9]
    assert "1 of 1 outputs are cut to 9 tokens" in one.notes
    short = read_sharegpt(SHAREGPT, count_tokens=words, output_len=3, fit=TraceFit(max_input_len=6))
    assert [r.prompt_text for r in short.requests] == ["Name three sorting algorithms, please."]
    assert [r.num_output_tokens for r in short.requests] == [3]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{}", "Expected `array`"),
        ('[{"id": "a"}]', "entry 1 has no conversations"),
        ('[{"conversations": [{"value": "a"}, {"from": "gpt"}]}]', "entry 1 has a turn without"),
        ("[", "truncated"),
        ("[]", "no requests in it"),
    ],
)
def test_a_bad_sharegpt_file(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "share.json"
    file.write_text(text)
    with pytest.raises(TraceError, match=r"share\.json") as caught:
        read_sharegpt(file, count_tokens=words)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((0.0, None, None), "--trace-length-scale 0.0"),
        ((1.0, 0, None), "--max-input-len 0"),
        ((1.0, None, -5), "--max-output-len -5"),
    ],
)
def test_a_bad_fit_is_named(arguments: tuple[float, int | None, int | None], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        TraceFit(*arguments)
