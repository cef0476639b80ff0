"""From a checkpoint directory to tokens, over the real models/ and both backends."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_device import FakeDevice
from fakes import make_request
from safetensors.numpy import load_file, save_file

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.reference import ReferenceBackend
from duetto.build import make_engine, served_config
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError
from duetto.core.files import Progress
from duetto.core.sampling_params import SamplingParams
from duetto.models.programs import load_program
from duetto.program.dtype import KV_DTYPES
from duetto.program.ops import Rope
from duetto.runner import choose_backend
from duetto.runner import load as load_module
from duetto.runner.device_runner import DeviceRunner
from duetto.runner.load import LoadedModel
from duetto.runner.loaders import ReferenceLoader
from duetto.runner.model_runner import ModelRunner

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 4 * 4  # layers, key and value, KV heads, head_dim, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


def write_checkpoint(model_dir, config):
    (model_dir / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(4)
    tensors = {}
    for spec in load_program(model_dir)[1].weights.values():
        for name, rows in zip(spec.sources, spec.source_rows, strict=True):
            tensor = rng.normal(size=(rows, *spec.shape[1:])) * 0.4 + (len(spec.shape) == 1)
            tensors[name] = tensor.astype(ml_dtypes.bfloat16)
    save_file(tensors, model_dir / "model.safetensors")
    return model_dir


def greedy(model, prompt, num_tokens, chunk=10**9):
    """Run one request the way a scheduler would, in the first blocks of the arena."""
    blocks = tuple(range(-(-(len(prompt) + num_tokens) // model.block_size)))
    sampling = SamplingInput(SamplingParams(temperature=0.0, logprobs=2), 0, 0)
    tokens, scored, start = list(prompt), [], 0
    while len(tokens) < len(prompt) + num_tokens:
        end = min(start + chunk, len(tokens))
        item = ScheduledRequest(
            "r",
            tuple(tokens[start:end]),
            start,
            blocks,
            (sampling,) if end == len(tokens) else (),
            prompt_logprob_targets=tuple(prompt[start + 1 : end + 1]),
        )
        (result,) = model.runner.submit(ScheduledBatch((item,))).result().results
        scored += result.scores
        start = end
        for token in result.tokens:
            tokens.append(token.token_id)
            scored.append(token.logprob)
    return scored


def load_as(model_dir: Path, on_progress: Progress | None = None, **options: Any) -> LoadedModel:
    return load_module.load_model(model_dir, EngineArgs(**options), on_progress=on_progress)


backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.mark.parametrize("asked", ["auto", "cpu", "reference"])
def test_a_checkpoint_generates_and_nothing_is_left_to_auto(checkpoint, asked):
    model = load_as(checkpoint, backend=asked)
    assert (model.dtype, model.quantization) == ("bfloat16", "none")
    if asked == "reference":
        assert (model.backend, model.computed_by) == ("reference", "reference")
        assert model.kv_dtype == "float32"
        assert model.kv_memory_bytes == 64 * 128 * KV_BYTES_PER_TOKEN
        assert model.weight_bytes == 4 * model.program.num_parameters
    else:
        assert model.backend == "cpu"
        assert model.computed_by.startswith("cpu/")
        assert model.kv_dtype == "bfloat16"
    assert (model.max_model_len, model.notes) == (128, ())
    assert model.num_blocks == 64 * 128 // 32
    assert model.numerics == f"{model.computed_by}/bfloat16/none/{model.kv_dtype}"
    answer = greedy(model, [1, 2, 3], 5)
    assert len(answer) == 2 + 5
    assert all(0 <= scored.token_id < 50 and scored.logprob <= 0 for scored in answer)
    assert {scored.rank for scored in answer[2:]} == {1}


@pytest.mark.parametrize("chunk", [1, 3, 32])
@pytest.mark.parametrize("block_size", [1, 7, 32])
@backends
def test_chunks_and_blocks_do_not_change_one_bit(checkpoint, chunk, block_size, backend):
    prompt = [int(t) for t in np.random.default_rng(8).integers(50, size=40)]
    whole = greedy(load_as(checkpoint, backend=backend), prompt, 6)
    model = load_as(checkpoint, backend=backend, block_size=block_size)
    assert greedy(model, prompt, 6, chunk) == whole


def logprob_differences(got, want, num_scored=28):
    pairs = zip(got[:num_scored], want[:num_scored], strict=True)
    return [abs(a.logprob - b.logprob) for a, b in pairs]


def test_dtypes_round_what_they_are_said_to_round(checkpoint):
    prompt = list(range(1, 30))
    as_stored = greedy(load_as(checkpoint, backend="reference"), prompt, 1)
    exact = load_as(checkpoint, backend="reference", dtype="float32")
    assert greedy(exact, prompt, 1) == as_stored
    sizes = {"bfloat16": 2 / 4, "float16": 2 / 4, "int8": (4 + 4) / (4 * 4)}  # head_dim is 4
    for kv_dtype, size in sizes.items():
        rounded = load_as(checkpoint, backend="reference", kv_cache_dtype=kv_dtype)
        got = greedy(rounded, prompt, 1)
        assert got != as_stored
        assert max(logprob_differences(got, as_stored)) < 0.2
        assert rounded.kv_memory_bytes == rounded.num_blocks * 32 * KV_BYTES_PER_TOKEN * size


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_cpu_backend_is_the_reference_within_its_own_rounding(checkpoint, dtype, kv_dtype):
    """fp32 adds up in another order; where bf16 is multiplied by its own instruction, the inputs of
    bf16 weights are rounded to 8 bits too, in a model so narrow that nothing evens out."""
    prompt = list(range(1, 30))
    loaded = [
        load_as(checkpoint, backend=backend, dtype=dtype, kv_cache_dtype=kv_dtype)
        for backend in ("cpu", "reference")
    ]
    native, reference = (greedy(model, prompt, 1) for model in loaded)
    limit = 1e-4 if kv_dtype == "float32" else 0.1  # a rounding that tips the other way
    if dtype == "bfloat16":
        limit = 0.2 if choose_isa() == "avx512_bf16" else 0.1
    assert max(logprob_differences(native, reference)) < limit
    assert loaded[0].kv_dtype == kv_dtype


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_take_what_they_should_and_answer_nearly_the_same(
    checkpoint, quantization
):
    prompt = list(range(1, 30))
    whole = load_as(checkpoint, dtype="float32")
    quantized = load_as(checkpoint, dtype="float32", quantization=quantization)
    kept = load_as(checkpoint, dtype="float32", quantization=quantization, quantization_skip=["*"])
    want = greedy(whole, prompt, 1)
    assert greedy(kept, prompt, 1) == want
    assert kept.weight_bytes == whole.weight_bytes > 2 * quantized.weight_bytes
    limit = {"int8": 0.1, "int4": 1.5}[quantization]  # 16 numbers wide, so nothing evens out
    assert 0 < np.mean(logprob_differences(greedy(quantized, prompt, 1), want)) < limit
    assert len({m.numerics for m in (whole, quantized, kept)}) == 3
    assert (quantized.quantization, kept.quantization) == (quantization, f"{quantization} -*")


def test_float16_weights_are_widened_and_that_is_told(checkpoint):
    model = load_as(checkpoint, backend="cpu", dtype="float16")
    assert model.kv_dtype == "float16"
    assert "float16 weights are kept as float32" in model.notes[0]
    assert load_as(checkpoint, backend="cpu", dtype="float16", quantization="int8").notes == ()


def test_a_weight_of_too_many_exponents_stays_in_16_bits_and_that_is_told(
    checkpoint, tmp_path, monkeypatch
):
    if choose_isa() == "avx512_bf16":  # it rounds inputs, so fp32 weights are no twin there
        monkeypatch.setenv("DUETTO_ISA", "avx512_vnni")
    (tmp_path / "config.json").symlink_to(checkpoint / "config.json")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    sizes = np.exp2(np.arange(-23, 1).astype(np.float32) * 2)  # for each column its own
    tensors[name] = (tensors[name].astype(np.float32) * sizes).astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    usual, odd = (load_as(each, backend="cpu") for each in (checkpoint, tmp_path))
    assert usual.notes == ()
    assert "kept in 16" in odd.notes[0] and name in odd.notes[0]
    assert odd.weight_bytes > usual.weight_bytes
    prompt = list(range(1, 30))
    whole = load_as(tmp_path, backend="cpu", dtype="float32", kv_cache_dtype="bfloat16")
    want = greedy(whole, prompt, 3)
    assert np.max(np.abs(logprob_differences(greedy(odd, prompt, 3), want))) < 1e-5


def test_weights_of_an_unnamed_dtype_are_kept_whole(checkpoint, tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    assert load_as(tmp_path).dtype == "float32"


@backends
def test_progress_is_told_in_bytes_up_to_the_end(checkpoint, backend):
    calls = []
    model = load_as(checkpoint, backend=backend, on_progress=lambda *call: calls.append(call))
    total = 2 * model.program.num_parameters if backend == "reference" else model.weight_bytes
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_a_context_that_does_not_fit_is_cut_and_noted_or_refused_if_asked_for(checkpoint):
    def load(**arguments):
        return load_as(checkpoint, backend="reference", **arguments)

    memory = 3 * 32 * KV_BYTES_PER_TOKEN
    model = load(kv_cache_memory_bytes=memory)
    assert (model.max_model_len, model.num_blocks) == (96, 3)
    assert "96" in model.notes[0]
    assert load(max_model_len=96, kv_cache_memory_bytes=memory).notes == ()
    with pytest.raises(ConfigError, match="--max-model-len 128"):
        load(max_model_len=128, kv_cache_memory_bytes=memory)


def test_free_memory_does_not_choose_among_longropes_frequencies(tmp_path):
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    longrope = {
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **factors},
    }
    write_checkpoint(tmp_path, CONFIG | longrope)

    def frequencies(**arguments):
        model = load_as(tmp_path, backend="reference", **arguments)
        return model.max_model_len, {op.spec for op in model.program.ops if isinstance(op, Rope)}

    memory = 64 * KV_BYTES_PER_TOKEN  # of the original context
    length, whole = frequencies()
    shortened_length, shortened = frequencies(kv_cache_memory_bytes=memory)
    asked_length, asked = frequencies(kv_cache_memory_bytes=memory, max_model_len=64)
    assert (length, shortened_length, asked_length) == (128, 64, 64)
    assert shortened == whole
    assert asked != whole


@backends
def test_the_weights_own_memory_is_not_offered_to_the_kv_cache(checkpoint, monkeypatch, backend):
    plenty = load_as(checkpoint, backend=backend)
    weights, block = plenty.weight_bytes, plenty.kv_memory_bytes // plenty.num_blocks

    def load(available, **arguments):
        monkeypatch.setattr(load_module, "available_memory_bytes", lambda: available)
        return load_as(checkpoint, backend=backend, **arguments)

    room = 4 * block
    assert load(weights + room).num_blocks == 1  # a quarter of the room
    assert load(weights + room, max_model_len=128).num_blocks == 4
    with pytest.raises(ConfigError, match="beside the weights, enough for 96 tokens"):
        load(weights + room - 1, max_model_len=128)
    with pytest.raises(ConfigError, match="enough for 0 tokens"):
        load(weights // 2)


@backends
def test_what_the_plan_counts_is_what_is_allocated(checkpoint, backend):
    for kv_dtype in KV_DTYPES:
        model = load_as(
            checkpoint, backend=backend, kv_cache_dtype=kv_dtype, kv_cache_memory_bytes=10**5
        )
        arena = model.runner.backend.allocate_kv(model.num_blocks, model.block_size, kv_dtype)
        if backend == "reference":
            rows = (*arena.keys, *arena.values)
            taken = sum(
                r.numbers.nbytes + (0 if r.scales is None else r.scales.nbytes) for r in rows
            )
        else:
            taken = sum(arena.blocks(layer).nbytes for layer in range(arena.num_layers))
        assert taken == model.kv_memory_bytes <= 10**5


@pytest.mark.parametrize(("name", "kind"), [("cpu", CpuBackend), ("reference", ReferenceBackend)])
def test_memory_that_the_system_refuses_is_one_line(checkpoint, monkeypatch, name, kind):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(kind, "allocate_kv", refuse)
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes: the system refuses"):
        load_as(checkpoint, backend=name)


def test_more_memory_for_kv_than_slots_can_be_counted_is_refused_or_taken(checkpoint):
    """2^31 slots take more memory than this machine may promise; either is an answer."""
    try:
        model = load_as(checkpoint, backend="cpu", kv_cache_memory_bytes=10**15)
    except ConfigError as error:
        assert "the system refuses" in str(error)
    else:
        assert model.num_blocks * model.block_size == 2**31


def test_without_the_native_module_the_reference_runs_and_says_so(checkpoint, monkeypatch):
    missing = "the native module cannot be loaded (no compiler)"
    monkeypatch.setattr(choose_backend, "why_unavailable", lambda: missing)
    model = load_as(checkpoint)
    assert model.backend == "reference"
    assert [note for note in model.notes if missing in note] == list(model.notes)
    assert load_as(checkpoint, backend="reference").notes == ()
    with pytest.raises(ConfigError, match="--backend cpu: the native module cannot be loaded"):
        load_as(checkpoint, backend="cpu")
    with pytest.raises(ConfigError, match=r"--quantization int8 .*reference.*cannot be loaded"):
        load_as(checkpoint, quantization="int8")


def test_instruction_sets_and_threads_from_the_environment(checkpoint, monkeypatch):
    monkeypatch.setenv("DUETTO_ISA", "baseline")
    model = load_as(checkpoint)
    assert model.computed_by == "cpu/baseline"
    assert "baseline kernels" in model.notes[0]
    for wrong in ("sse9", "AVX2", *set(native.built_isas()) - set(native.isas())):
        monkeypatch.setenv("DUETTO_ISA", wrong)
        with pytest.raises(ConfigError, match=f"^DUETTO_ISA: [^:]*{wrong}.*"):
            load_as(checkpoint)
    monkeypatch.delenv("DUETTO_ISA")
    for wrong in ("0", "two", "-1", "1e3", "99999"):
        monkeypatch.setenv("DUETTO_NUM_THREADS", wrong)
        with pytest.raises(ConfigError, match=r"DUETTO_NUM_THREADS: must be from 1 to "):
            load_as(checkpoint)
    assert load_as(checkpoint, threads=1).backend == "cpu"  # the flag is stronger


def test_more_threads_than_processors_run_and_that_is_told(checkpoint):
    threads = native.available_threads() + 1
    (note,) = load_as(checkpoint, threads=threads).notes
    assert note.startswith(f"{threads} threads share {threads - 1} processors")
    assert load_as(checkpoint, threads=threads - 1).notes == ()


def test_threads_that_the_system_refuses_are_one_line(checkpoint, monkeypatch):
    def refuse(_):
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(native, "Pool", refuse)
    with pytest.raises(ConfigError, match=r"--threads: the system refuses to start 2 \(Resource"):
        load_as(checkpoint, threads=2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"backend": "tpu"}, r"--backend: 'tpu' .*auto, cpu, reference, cuda"),
        ({"quantization": "awq"}, r"--quantization: 'awq' .*int8, int4, fp8, none"),
        (
            {"quantization": "int8", "backend": "reference"},
            r"--quantization int8 and the reference backend: .*--backend cpu",
        ),
        ({"threads": 2, "backend": "reference"}, r"--threads 2 and the reference backend"),
        ({"threads": 0}, r"--threads: must be 1 or more"),
        ({"threads": 1025}, r"--threads: must be from 1 to 1024, not 1025"),
        ({"packed_cache": ""}, r"--packed-cache: must be a directory, auto or off"),
        ({"quantization_skip": ["*"]}, r"--quantization-skip \*: there is no --quantization"),
        (
            {"quantization": "int4", "quantization_skip": ["model.layers.9.*"]},
            r"--quantization-skip: 'model.layers.9.\*' matches no tensor",
        ),
        ({"dtype": "int8"}, r"--dtype: 'int8' .*auto, float32, float16, bfloat16"),
        (
            {"kv_cache_dtype": "fp3"},
            r"--kv-cache-dtype: 'fp3' .*auto, float32, float16, bfloat16, int8, fp8",
        ),
        ({"kv_cache_dtype": ""}, r"--kv-cache-dtype: '' "),
        ({"max_model_len": 129}, r"--max-model-len.*128"),
        ({"max_model_len": 0}, r"--max-model-len"),
        ({"block_size": 0}, r"--block-size: must be 1 or more"),
        ({"max_num_seqs": 0}, r"--max-num-seqs: must be 1 or more"),
        ({"kv_cache_memory_bytes": -1}, r"--kv-cache-memory-bytes: must be 1 or more"),
        ({"block_size": 10**9}, r"--max-model-len 128: .* left beside the weights"),
        ({"block_size": 2**31}, r"--backend cpu: blocks of 2147483648 tokens: must be 1 to "),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_weight_is_read(checkpoint, argument, message):
    def never(done, total):
        raise AssertionError("weights were read")

    with pytest.raises(ConfigError, match=message):
        load_as(checkpoint, on_progress=never, **argument)


@backends
def test_a_weight_that_is_no_number_is_told_with_tensor_and_place(checkpoint, tmp_path, backend):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"  # stacked below two others
    tensors[name][5, 3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} holds nan at \[5, 3\]"):
        load_as(tmp_path, backend=backend)


def test_a_directory_without_a_model_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_as(tmp_path)


@pytest.mark.parametrize("is_device", [False, True])
def test_the_runner_is_the_backends_and_the_engine_keeps_as_many_steps_in_flight(
    checkpoint, monkeypatch, is_device
):
    if is_device:
        load = ReferenceLoader.load
        monkeypatch.setattr(ReferenceLoader, "load", lambda *given: FakeDevice(load(*given)))
    loaded = load_as(checkpoint, backend="reference")
    engine = make_engine(loaded, served_config(loaded, EngineArgs()))
    assert type(loaded.runner) is (DeviceRunner if is_device else ModelRunner)
    assert engine._depth == int(is_device)
    engine.add(make_request("r", [1, 2, 3], 5))
    updates = [update for _ in range(9) for update in engine.step().updates]
    assert sum(len(update.tokens) for update in updates) == 5
