"""`duetto bench kernels`: its arithmetic, its steps, and every kernel measured once, small."""

import json
from typing import Any

import numpy as np
import pytest

from duetto.cli.bench import app
from duetto.core.errors import ConfigError
from duetto.measure import kernels
from duetto.measure.kernels import Machine, Measured

MACHINE = Machine("avx2", 2, 10e9, {"f32": 1e11, "bf16": 1e11, "int8": 4e11}, 100.0)


def measured(num_bytes: int, num_ops: int, seconds: float = 1.0) -> Measured:
    return Measured("linear", "1 x 1", "int8", 1, seconds, num_bytes, num_ops, "int8")


def test_the_limit_is_the_slower_of_moving_and_multiplying() -> None:
    assert measured(int(20e9), int(4e11)).limit(MACHINE) == 2.0  # memory
    assert measured(int(5e9), int(12e11)).limit(MACHINE) == 3.0  # arithmetic
    assert measured(int(5e9), int(12e11), 6.0).as_json(MACHINE)["of_machine"] == 0.5
    in_cache = Measured("add", "8 columns", "f32", 1, 1.0, 8, 0, None)
    assert in_cache.limit(MACHINE) is None
    assert in_cache.as_json(MACHINE)["of_machine"] is None


def test_the_better_of_two_probes_counts() -> None:
    other = Machine("avx2", 2, 9e9, {"f32": 2e11, "bf16": 1e10, "int8": 4e11}, 80.0)
    best = MACHINE.best_of(other)
    assert best.read_bandwidth == 10e9
    assert best.peaks == {"f32": 2e11, "bf16": 1e11, "int8": 4e11}
    assert best.barrier_ns == 80.0


def test_requests_that_decode_share_no_block() -> None:
    step = kernels.decoding(3)
    tables = step["block_tables"]
    assert tables.shape == (3, kernels.CONTEXT // kernels.BLOCK_SIZE)
    assert len(np.unique(tables)) == tables.size
    assert (step["positions"] == kernels.CONTEXT - 1).all()


def run(*words: str) -> None:
    app(["kernels", *words], exit_on_error=False, print_error=False, result_action="return_value")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "WORKING_SET", 1 << 20)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_every_kernel_is_measured(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("duetto._native")
    words = "tiny --rows 1 40 --weights bf16 int8 int4 --kv bf16 int8 --threads 2"
    report = run_json(capsys, *words.split())
    assert report["machine"]["num_threads"] == 2
    assert set(report["machine"]["peaks"]) == {"f32", "bf16", "int8"}
    found = {(k["kernel"], k["format"], k["rows"]) for k in report["kernels"]}
    for format in ("bf16", "int8", "int4"):
        assert {("linear", format, 1), ("linear", format, 40)} <= found
    for format in ("bf16", "int8"):
        assert ("attention, decode at 1024", format, 1) in found
        assert ("attention, prefill", format, 40) in found
    assert {("rms_norm", "f32", 1), ("gated_act", "f32", 40), ("rope", "f32", 1)} <= found
    assert all(k["seconds"] > 0 for k in report["kernels"])
    shapes = {k["shape"] for k in report["kernels"] if k["kernel"] == "linear"}
    assert shapes == {
        "q_proj 128 x 64",  # with k_proj and v_proj
        "o_proj 64 x 64",
        "gate_proj 256 x 64",
        "down_proj 64 x 128",
        "head 1024 x 64",
    }


def test_weights_count_as_packed(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("duetto._native")
    words = ["tiny", "--rows", "1", "--kernel", "linear", "--weights", "bf16", "int8"]
    found = run_json(capsys, *words)["kernels"]
    sizes = {k["format"]: k["num_bytes"] for k in found if k["shape"] == "gate_proj 256 x 64"}
    assert sizes == {"bf16": 256 * 64 * 2, "int8": 256 * 64 + 256 * 2}  # a bf16 scale per output


def test_a_table_for_people(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("duetto._native")
    run("tiny", "--rows", "1", "--kernel", "linear", "rows", "--weights", "int8")
    out = capsys.readouterr().out
    assert "GB/s" in out and "of machine" in out and "in cache" in out
    assert "q_proj 128 x 64" in out


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match="named shapes are"):
        run("no-such-model")
    with pytest.raises(ConfigError, match="--rows"):
        run("tiny", "--rows", "0")


def test_rows_that_memory_does_not_hold_are_refused_with_the_numbers() -> None:
    pytest.importorskip("duetto._native")
    with pytest.raises(ConfigError, match=r"--rows 1000000000: takes about .* GiB .* available"):
        run("llama-3-70b", "--rows", "1", "1000000000", "--kernel", "rows")
