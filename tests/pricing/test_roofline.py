"""duetto roofline: what it says, as JSON, as a table and as a picture."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pricing.prices import A100, decode, model, prefill, program

from duetto.cli.roofline import roofline as command
from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.host import computable
from duetto.pricing.picture import draw_roofline
from duetto.pricing.roofline import roofline
from duetto.program.shape import Precision

HOST = HardwareSpec(
    name="host", peaks={"float32": 1e11, "int8": 2e11}, memory_bandwidth=2e10, memory_bytes=2**33
)


def run(capsys, *args, **flags):
    command(*args, as_json=True, **flags)
    return json.loads(capsys.readouterr().out)


def test_the_json_has_what_a_reader_asks_for(capsys):
    found = run(capsys, "llama-2-70b", hardware="h100:8", tp=8, batch=4, context=512)
    assert found["hardware"]["name"] == "h100"
    assert found["deployment"]["tensor_parallel"] == 8
    for step, key in (("prefill", "prefill_time_s"), ("decode", "decode_step_time_s")):
        rows = found[step]["operations"]
        assert found[key] == found[step]["time_s"] > found[step]["datasheet_time_s"] > 0
        assert sum(row["time_s"] for row in rows) == pytest.approx(found[key])
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        for row in rows:
            assert {"name", "flops", "bytes_moved", "intensity", "bound", "time_s"} <= set(row)
        totals = found[step]["totals"]
        assert totals["intensity"] == pytest.approx(
            totals["flops"] / (totals["bytes_read"] + totals["bytes_written"])
        )
    assert found["prefill"]["totals"]["num_tokens"] == 4 * 512
    assert found["decode"]["totals"]["num_tokens"] == 4
    for step in ("prefill", "decode"):
        totals = found[step]["totals"]
        by_rule = totals["flops_by_rule_of_thumb"]
        assert by_rule == 2 * totals["num_tokens"] * 68_976_648_192
        assert by_rule == pytest.approx(totals["flops"], rel=0.02)
    assert found["sanity"]["parameters"] == 68_976_648_192


def test_prefill_and_decode_are_the_cost_models(capsys):
    found = run(capsys, "llama-2-7b", hardware="a100", batch=3, context=700, dtype="bfloat16")
    own = model("llama-2-7b", A100, Deployment(graphs=True))
    assert found["prefill_time_s"] == own.step_time(prefill(3, 700))
    assert found["decode_step_time_s"] == own.step_time(decode(3, 700))


def test_datasheet_alone_and_graphs_take_less(capsys):
    flags = {"hardware": "a100", "tp": 8, "batch": 1, "context": 512}
    whole = run(capsys, "llama-2-70b", graphs=False, **flags)
    graphs = run(capsys, "llama-2-70b", **flags)
    assert graphs == run(capsys, "llama-2-70b", graphs=True, **flags)  # assumed of GPUs
    bare = run(capsys, "llama-2-70b", datasheet=True, **flags)
    times = [found["decode_step_time_s"] for found in (bare, graphs, whole)]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]
    assert bare["decode_step_time_s"] == whole["decode"]["datasheet_time_s"]


def test_whose_host_it_is_is_said_where_its_time_counts(capsys):
    flags = {"hardware": "h100", "context": 512}
    words = "vLLM of 2023"
    assert any(words in note for note in run(capsys, "llama-3-8b", graphs=False, **flags)["notes"])
    assert not run(capsys, "llama-3-8b", **flags)["notes"]
    assert not run(capsys, "llama-3-8b", datasheet=True, **flags)["notes"]


def test_dtypes_change_bytes(capsys):
    flags = {"hardware": "h100", "context": 4096, "batch": 8}
    wide = run(capsys, "llama-3-8b", **flags)
    int4 = run(capsys, "llama-3-8b", dtype="int4", kv_dtype="int8", **flags)
    assert int4["decode_step_time_s"] < wide["decode_step_time_s"]
    # A head has 128 numbers, in int8 with a scale of 4 bytes.
    per_token = wide["sanity"]["kv_bytes_per_token"] * (128 + 4) / (2 * 128)
    assert int4["sanity"]["kv_bytes_per_token"] == per_token


def test_a_model_is_a_directory_a_file_or_a_name(capsys, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path, tmp_path / "config.json"):
        found = run(capsys, str(place), hardware="l4", context=100)
        assert found["sanity"]["kv_bytes_per_token"] == 2 * 2 * 64 * 2
    for name in ("llama-9", ""):
        with pytest.raises(ConfigError, match=r"no named shape.*llama-3-8b"):
            run(capsys, name, hardware="l4")


def test_notes_say_what_is_odd(capsys):
    found = run(capsys, "llama-2-70b", hardware="l4", context=8192)
    beyond, too_large = found["notes"]
    assert "beyond the model's own 4096" in beyond
    assert "do not fit" in too_large


@pytest.mark.parametrize("flag", ["batch", "context", "chunk"])
@pytest.mark.parametrize("value", [0, -3, 10**400])
def test_numbers_that_no_step_has_are_refused(capsys, flag, value):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        run(capsys, "tiny", hardware="l4", **{flag: value})


def test_a_batch_has_no_more_parts_than_requests(capsys):
    with pytest.raises(ConfigError, match="--micro-batches 5: a batch of 4 has at most 4 parts"):
        run(capsys, "tiny", hardware="l4:2", pp=2, batch=4, micro_batches=5)
    with pytest.raises(ConfigError, match="--micro-batches: must be 1 or more"):
        run(capsys, "tiny", hardware="l4", micro_batches=0)


@pytest.mark.parametrize(("pp", "parts"), [(1, 1), (2, 1), (4, 1), (4, 4), (2, 8)])
def test_bubbles_are_those_of_the_closed_form(capsys, pp, parts):
    """Prefill is bound by arithmetic: a part takes its share, and each stage the same."""
    flags = {"pp": pp, "micro_batches": parts, "batch": 8, "context": 4000}
    found = run(capsys, "llama-2-70b", hardware="h100:8", graphs=True, **flags)
    rule = (pp - 1) / (parts + pp - 1)
    assert found["prefill"]["bubble"] == pytest.approx(rule, abs=0.02)
    for name in ("prefill", "decode", "mixed"):
        rows = {row["name"]: row for row in found[name]["operations"]}
        assert ("bubble" in rows) == (pp > 1)
        whole = found[name]["time_s"]
        assert found[name]["interval_s"] <= whole * 1.0001
        if parts >= pp:
            lasts = whole * (1 - found[name]["bubble"])
            assert found[name]["interval_s"] == pytest.approx(lasts, rel=0.1)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-0.5b"])
def test_equal_requests_need_not_be_enumerated(name):
    """The dumb way is to list them all."""
    own = CostModel(program(name), A100, Deployment())
    found = roofline(program(name), A100, Deployment(), batch=7, context=900, chunk=300)
    piece = RequestShape(300, 300, 0)
    mixed = BatchShape((*decode(7, 900).requests, piece))
    for step, shape in (
        (found.prefill, prefill(7, 900)),
        (found.decode, decode(7, 900)),
        (found.mixed, mixed),
    ):
        assert step.time_s == own.step_time(shape)
        assert step.operations == own.price(shape)
        assert step.cost == own.program.cost(shape, own.deployment.precision)
        assert step.num_tokens == shape.num_tokens
    most = roofline(program(name), A100, Deployment(), batch=10**9, context=900)
    assert most.decode.num_tokens == 10**9


def test_both_turning_points_have_a_name(capsys):
    sanity = run(capsys, "llama-3-8b", hardware="h100")["sanity"]
    ideal = run(capsys, "llama-3-8b", hardware="h100", datasheet=True)["sanity"]
    by_datasheet = sanity["datasheet_decode_turns_compute_bound_at"]
    assert by_datasheet == ideal["decode_turns_compute_bound_at"]
    assert by_datasheet != sanity["decode_turns_compute_bound_at"]
    assert by_datasheet > sanity["balance_flops_per_byte"]  # 2 FLOP for each weight of 2 bytes


def test_the_table_names_operations_and_what_binds_them(capsys):
    command("llama-3-8b", hardware="h100", context=512)
    shown = capsys.readouterr().out
    for words in ("prefill", "decode", "mixed", "gate+up_proj x32", "memory", "compute", "balance"):
        assert words in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "…" not in shown


def test_a_host_without_16_bit_arithmetic_widens():
    wide = computable(Deployment(), HOST)
    assert (wide.arithmetic, wide.precision) == ("float32", Precision(2.0, 4.0, 2.0))
    int8 = computable(Deployment(precision=Precision(1.06, 2.0, 2.0)), HOST)
    assert int8.arithmetic == "int8"
    assert computable(Deployment(), A100) == Deployment()
    assert computable(Deployment(arithmetic="float8"), HOST).arithmetic == "float8"  # refused later


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_picture(tmp_path, name, begins):
    pytest.importorskip("matplotlib")
    found = roofline(program("llama-3-8b"), A100, Deployment(), batch=8, context=2048)
    files = [tmp_path / name, tmp_path / f"again-{name}"]
    for file in files:
        draw_roofline(found, "bfloat16", file)
    assert files[0].read_bytes().startswith(begins)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_picture_needs_a_kind_and_matplotlib(tmp_path, monkeypatch):
    found = roofline(program("tiny"), A100, Deployment(), batch=1, context=10)
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw_roofline(found, "bfloat16", Path("a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[plot\]'"):
        draw_roofline(found, "bfloat16", tmp_path / "a.png")


def test_a_small_model_is_told_with_the_roof_of_its_caches():
    weights = 2 * program("tiny").num_parameters
    caching = replace(HOST, read_bandwidths=((weights, 8e10), (100 * weights, 2e10)))
    deployment = computable(Deployment(), caching)
    found = roofline(program("tiny"), caching, deployment, batch=1, context=10)
    assert found.hardware.memory_bandwidth == 8e10
    assert "80 GB/s, where memory gives 20" in " ".join(found.notes)
    plain = roofline(program("tiny"), HOST, deployment, batch=1, context=10)
    assert found.decode.time_s < plain.decode.time_s
    assert plain.hardware.memory_bandwidth == 2e10
    assert not any("caches" in note for note in plain.notes)


def test_what_is_known_is_listed_and_near_misses_are_suggested(capsys):
    command(list_known=True)
    shown = capsys.readouterr().out
    command(list_known=True, as_json=True)
    known = json.loads(capsys.readouterr().out)
    assert {"llama-3-8b", "duetto-demo"} <= set(known["models"])
    assert {"h100", "l4"} <= set(known["hardware"])
    assert all(name in shown for name in (*known["models"], *known["hardware"]))
    for name, words in (("lama3-8b", "did you mean llama-3-8b"), ("Qwen2.5-7", "qwen2.5-7b")):
        with pytest.raises(ConfigError, match=words):
            command(name, hardware="l4")
    for hardware, words in (("h10", "did you mean h100"), ("A100-80", "did you mean a100-80g")):
        with pytest.raises(ConfigError, match=words):
            command("llama-3-8b", hardware=hardware)
    with pytest.raises(ConfigError, match=r"MODEL is missing.*--list"):
        command()
