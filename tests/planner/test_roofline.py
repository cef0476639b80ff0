"""duetto roofline: what it says, as JSON, as a table and as a picture."""

import json
import sys
from pathlib import Path

import pytest
from planner.prices import A100, decode, model, prefill, program

from duetto.cli.roofline import roofline as command
from duetto.core.errors import ConfigError
from duetto.planner.cost_model import Deployment
from duetto.planner.hardware import HardwareSpec
from duetto.planner.host import computable
from duetto.planner.picture import draw_roofline
from duetto.planner.roofline import roofline
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
    own = model("llama-2-7b", A100)
    assert found["prefill_time_s"] == own.step_time(prefill(3, 700))
    assert found["decode_step_time_s"] == own.step_time(decode(3, 700))


def test_datasheet_alone_and_graphs_take_less(capsys):
    flags = {"hardware": "a100", "tp": 8, "batch": 1, "context": 512}
    whole = run(capsys, "llama-2-70b", **flags)
    graphs = run(capsys, "llama-2-70b", graphs=True, **flags)
    bare = run(capsys, "llama-2-70b", datasheet=True, **flags)
    times = [found["decode_step_time_s"] for found in (bare, graphs, whole)]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]
    assert bare["decode_step_time_s"] == whole["decode"]["datasheet_time_s"]


def test_whose_host_it_is_is_said_where_its_time_counts(capsys):
    flags = {"hardware": "h100", "context": 512}
    words = "vLLM of 2023"
    assert any(words in note for note in run(capsys, "llama-3-8b", **flags)["notes"])
    assert not run(capsys, "llama-3-8b", graphs=True, **flags)["notes"]
    assert not run(capsys, "llama-3-8b", datasheet=True, **flags)["notes"]


def test_dtypes_change_bytes(capsys):
    flags = {"hardware": "h100", "context": 4096, "batch": 8}
    wide = run(capsys, "llama-3-8b", **flags)
    int4 = run(capsys, "llama-3-8b", dtype="int4", kv_dtype="int8", **flags)
    assert int4["decode_step_time_s"] < wide["decode_step_time_s"]
    assert wide["sanity"]["kv_bytes_per_token"] == 2 * int4["sanity"]["kv_bytes_per_token"]


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
    with pytest.raises(ConfigError, match="llama-3-8b"):
        run(capsys, "llama-9", hardware="l4")


def test_notes_say_what_is_odd(capsys):
    found = run(capsys, "llama-2-70b", hardware="l4", context=8192)
    beyond, too_large, _host = found["notes"]
    assert "beyond the model's own 4096" in beyond
    assert "do not fit" in too_large


@pytest.mark.parametrize("flag", ["batch", "context", "chunk"])
def test_numbers_below_1_are_refused(capsys, flag):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        run(capsys, "tiny", hardware="l4", **{flag: 0})


def test_the_table_names_operations_and_what_binds_them(capsys):
    command("llama-3-8b", hardware="h100", context=512)
    shown = capsys.readouterr().out
    for words in ("prefill", "decode", "mixed", "gate+up_proj x32", "memory", "compute", "balance"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80
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
        draw_roofline(found, A100, "bfloat16", file)
    assert files[0].read_bytes().startswith(begins)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_picture_needs_a_kind_and_matplotlib(tmp_path, monkeypatch):
    found = roofline(program("tiny"), A100, Deployment(), batch=1, context=10)
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw_roofline(found, A100, "bfloat16", Path("a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"duetto\[plot\]"):
        draw_roofline(found, A100, "bfloat16", tmp_path / "a.png")
