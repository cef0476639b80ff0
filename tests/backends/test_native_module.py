"""The rest of the native module: its stub, packing, instruction sets, threads and probes."""

import ast
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends.native_cases import ISAS, native, numbers, pack

import duetto

FORMATS = [("f32", 0), ("bf16", 0), ("bf12", 0), ("int8", 0), ("int8", 128), ("int4", 64)]


@pytest.fixture(params=[1, 3], ids="threads{}".format)
def pool(request: pytest.FixtureRequest) -> Any:
    return native.Pool(request.param)


def test_the_stub_names_what_there_is() -> None:
    """mypy believes _native.pyi; nothing else compares it with the module."""
    stub = ast.parse((Path(duetto.__file__).parent / "_native.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert hasattr(native, node.name), node.name
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)} - {"__init__"}
            there = {name for name in vars(getattr(native, node.name)) if not name.startswith("_")}
            assert methods == there, node.name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packing_takes_stacked_sources_of_every_type(isa: str, dtype: str, pool: Any) -> None:
    from_f32 = numbers(100, 24)
    if dtype == "bfloat16":
        bits = (from_f32.view(np.uint32) >> 16).astype(np.uint16)
        stored, expected = bits, (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = from_f32.astype(dtype)
        expected = stored.astype(np.float32)
    data = native.Arena(native.packed_bytes("f32", 0, 100, 24)[0]).array
    sources = [stored[:1], stored[1:70], stored[70:]]
    assert native.pack("f32", 0, sources, data, None, pool) is None
    weight = native.Weight("f32", 0, 100, 24, data)
    np.testing.assert_array_equal(weight.unpack(isa), expected)


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_row_that_is_not_finite_is_named(
    format: Any, group: int, bad: float, pool: Any
) -> None:
    weight = numbers(300, 64)
    weight[[211, 130, 290], 63] = bad
    data_bytes, scale_bytes = native.packed_bytes(format, group, 300, 64)
    data, scales = native.Arena(data_bytes).array, native.Arena(scale_bytes).array
    found = native.pack(format, group, [weight], data, scales if scale_bytes else None, pool)
    assert found == 130


def test_quantized_weights_are_near() -> None:
    weight = numbers(64, 256)
    for format, group, most in (("int8", 128, 0.006), ("int4", 64, 0.1)):
        error = pack(format, group, weight).unpack(ISAS[-1]) - weight
        assert 0 < np.sqrt((error**2).mean()) / weight.std() < most


def test_arrays_may_go_before_the_weight() -> None:
    weight = pack("f32", 0, numbers(64, 64))  # nothing else holds its arena
    gc.collect()
    np.testing.assert_array_equal(weight.unpack(ISAS[0]), numbers(64, 64))


def test_checksum_is_xxh64() -> None:
    def of(text: bytes) -> int:
        return int(native.checksum(np.frombuffer(text, np.uint8)))

    assert of(b"") == 0xEF46DB3751D8E999
    assert of(b"abc") == 0x44BC2CF5AD770999
    assert of(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1
    assert native.checksum(numbers(5, 7)) == of(numbers(5, 7).tobytes())


def test_an_unknown_instruction_set_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=f"can run {', '.join(ISAS)}"):
        native.choose_isa("sse9")
    for isa in set(native.built_isas()) - set(ISAS):
        with pytest.raises(
            ValueError, match=f"it has no {', '.join(native.missing_features(isa))}"
        ):
            native.choose_isa(isa)
    assert native.choose_isa(ISAS[0]) == ISAS[0]


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "import duetto._native as n; print(n.choose_isa())"
    for value, expected in (
        ("baseline", "baseline"),
        ("", ISAS[-1]),
        ("sse9", "DUETTO_ISA: no in"),
    ):
        environment = os.environ | {"DUETTO_ISA": value}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert expected in found.stdout + found.stderr


def test_available_threads_respect_affinity() -> None:
    code = (
        "import os, duetto._native as n; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "assert n.available_threads() == 1 == n.Pool().num_threads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 1 <= native.available_threads() <= len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="1 to 4096 threads"):
        native.Pool(-1)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="builds bring their own CMake")
def test_without_a_compiler_the_build_says_so_and_ends_well(tmp_path: Path) -> None:
    def configure(compiler: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(Path(__file__).parents[2]), "-B", str(tmp_path)]
        environment = os.environ | {"CXX": compiler}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    found = configure(str(tmp_path / "no-compiler"))
    assert found.returncode == 0, found.stderr
    assert "There is no C++ compiler" in found.stderr
    if compiler := shutil.which("c++"):  # is found though there was none before
        assert "There is no C++ compiler" not in configure(compiler).stderr


def test_probes_measure_something() -> None:
    pool = native.Pool(1)
    assert native.read_bandwidth(pool, 1 << 22, 2) > 1e8
    for isa in ISAS:
        assert native.int8_peak(pool, isa) > native.fp32_peak(pool, isa) > 1e8
        assert native.bf16_peak(pool, isa) > 1e8
    assert native.Pool(2).barrier_ns(100) > 0
