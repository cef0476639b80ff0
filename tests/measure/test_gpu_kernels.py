"""What is measured of a GPU, as far as no GPU is needed: shapes, limits, and who refuses."""

from collections.abc import Callable

import pytest

from duetto.backends.cuda import device
from duetto.cli.bench_gpu_kernels import UNCACHED_BYTES, few_layers
from duetto.cli.bench_kernels import kernels
from duetto.cli.calibrate import calibrate
from duetto.core.errors import ConfigError
from duetto.measure.gpu import MODEL, SHAPES, gpu_is_here
from duetto.measure.gpu_kernels import (
    MOST_DECODED,
    GpuKernel,
    GpuMachine,
    name_of,
    step_shape,
)
from duetto.models.find import find_config
from duetto.program.ops import Linear
from duetto.program.rewrites.runs import GPU_RUNS, fuse_runs

MACHINE = GpuMachine("H100", 2.5e12, 3e12, {"bfloat16": 8e14, "float32": 5e13})


def kernel(num_bytes: int, num_ops: int, seconds: float) -> GpuKernel:
    return GpuKernel(
        "o_proj", "linear", "8 x 8", "bfloat16", 1, seconds, num_bytes, num_ops, "bfloat16"
    )


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "probe_gpu", lambda: device.GpuFacts())


def test_the_longer_of_memory_and_arithmetic_is_the_limit() -> None:
    assert kernel(2_500_000, 1, 2e-6).limit(MACHINE) == pytest.approx(1e-6)
    assert kernel(1, 8 * 10**9, 2e-5).limit(MACHINE) == pytest.approx(1e-5)
    shown = kernel(2_500_000, 1, 2e-6).as_json(MACHINE)
    assert shown["of_machine"] == pytest.approx(0.5)
    assert shown["bytes_per_s"] == pytest.approx(1.25e12)


def test_few_rows_are_next_tokens_and_many_a_prompt() -> None:
    few, many = step_shape(3, 1024), step_shape(MOST_DECODED + 1, 1024)
    assert [(r.num_new, r.num_past) for r in few.requests] == [(1, 1023)] * 3
    assert [(r.num_new, r.num_past) for r in many.requests] == [(MOST_DECODED + 1, 0)]


def test_layers_are_so_many_that_no_cache_holds_a_projection() -> None:
    for name in ("llama-3-8b", "llama-3.2-1b"):
        config = find_config(name)
        program = few_layers(config)
        sizes: dict[str, int] = {}
        for op in program.ops:
            if isinstance(op, Linear) and not op.weight.startswith(("lm_head", "model.embed")):
                label = op.label(program)
                sizes[label] = sizes.get(label, 0) + 2 * op.out.width * op.x.width
        is_whole = len(program.kv) == len(config.layers)
        assert is_whole or min(sizes.values()) >= UNCACHED_BYTES
        assert len(program.kv) <= len(config.layers)


def test_what_is_fused_is_named_with_all_its_parts() -> None:
    program = few_layers(find_config("llama-3-8b"))
    names = {name_of(op, program) for op in fuse_runs(program, GPU_RUNS).ops}
    assert {"gate+up_proj + gated_act", "o_proj", "attention", "lm_head"} <= names


def test_the_shapes_that_are_measured_fit_the_model() -> None:
    for shape in SHAPES:
        longest = max(r.num_past + r.num_new for r in shape.requests)
        assert longest <= MODEL["max_position_embeddings"]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: kernels(backend="cuda"), "--backend cuda: there is no NVIDIA driver"),
        (
            lambda: kernels(backend="cuda", weights=("bf12",)),
            "--weights bf12: is for --backend cpu",
        ),
        (lambda: kernels(backend="cuda", threads=2), "--threads 2 and --backend cuda"),
        (lambda: kernels(backend="cuda", rows=()), "--rows: must be numbers from 1"),
        (lambda: kernels(weights=("fp8",)), "--weights fp8: is for --backend cuda"),
        (lambda: kernels(kv=("fp8",)), "--kv fp8: is for --backend cuda"),
        (lambda: calibrate(backend="cuda"), "--backend cuda: there is no NVIDIA driver"),
        (lambda: calibrate(backend="cuda", threads=2), "--threads 2 and the GPU"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    ask: Callable[[], None], words: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        ask()
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


def test_an_interpreter_is_no_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = device.GpuFacts(torch="2", triton="3", is_interpreted=True)
    monkeypatch.setattr(device, "probe_gpu", lambda: facts)
    assert not gpu_is_here()
