"""From a checkpoint directory to tokens, over the real models/ and the reference backend."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.errors import CheckpointError, ConfigError
from duetto.core.sampling_params import SamplingParams
from duetto.models.programs import load_program
from duetto.program.ops import Rope
from duetto.runner import load
from duetto.runner.load import load_model

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
            sampling if end == len(tokens) else None,
            prompt_logprob_targets=tuple(prompt[start + 1 : end + 1]),
        )
        output = model.runner.execute(ScheduledBatch((item,)))
        scored += output.prompt_logprobs.get("r", ())
        start = end
        for token in output.sampled.get("r", ()):
            tokens.append(token.token_id)
            scored.append(token.logprob)
    return scored


def test_a_checkpoint_generates_and_nothing_is_left_to_auto(checkpoint):
    model = load_model(checkpoint)
    assert (model.backend, model.dtype, model.kv_dtype) == ("reference", "bfloat16", "float32")
    assert (model.max_model_len, model.notes) == (128, ())
    assert model.num_blocks == 64 * 128 // 32
    assert model.kv_memory_bytes == 64 * 128 * KV_BYTES_PER_TOKEN
    answer = greedy(model, [1, 2, 3], 5)
    assert len(answer) == 2 + 5
    assert all(0 <= scored.token_id < 50 and scored.logprob <= 0 for scored in answer)
    assert {scored.rank for scored in answer[2:]} == {1}


@pytest.mark.parametrize("chunk", [1, 3, 32])
@pytest.mark.parametrize("block_size", [4, 32])
def test_chunks_and_blocks_do_not_change_one_bit(checkpoint, chunk, block_size):
    prompt = [int(t) for t in np.random.default_rng(8).integers(50, size=40)]
    whole = greedy(load_model(checkpoint), prompt, 6)
    model = load_model(checkpoint, block_size=block_size)
    assert greedy(model, prompt, 6, chunk) == whole


def test_dtypes_round_what_they_are_said_to_round(checkpoint):
    prompt = list(range(1, 30))
    as_stored = greedy(load_model(checkpoint), prompt, 1)
    assert greedy(load_model(checkpoint, dtype="float32"), prompt, 1) == as_stored
    for rounded in (
        load_model(checkpoint, kv_cache_dtype="bfloat16"),
        load_model(checkpoint, kv_cache_dtype="float16"),
    ):
        got = greedy(rounded, prompt, 1)
        assert got != as_stored
        difference = [a.logprob - b.logprob for a, b in zip(got[:28], as_stored[:28], strict=True)]
        assert max(map(abs, difference)) < 0.2
        assert rounded.num_blocks * 2 * KV_BYTES_PER_TOKEN // 4 * 32 == rounded.kv_memory_bytes


def test_weights_of_an_unnamed_dtype_are_kept_whole(checkpoint, tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    assert load_model(tmp_path).dtype == "float32"


def test_progress_is_told_in_bytes_up_to_the_end(checkpoint):
    calls = []
    model = load_model(checkpoint, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (2 * model.program.num_parameters,) * 2
    assert calls == sorted(calls)


def test_a_context_that_does_not_fit_is_cut_and_noted_or_refused_if_asked_for(checkpoint):
    memory = 3 * 32 * KV_BYTES_PER_TOKEN
    model = load_model(checkpoint, kv_cache_memory_bytes=memory)
    assert (model.max_model_len, model.num_blocks) == (96, 3)
    assert "96" in model.notes[0]
    assert load_model(checkpoint, max_model_len=96, kv_cache_memory_bytes=memory).notes == ()
    with pytest.raises(ConfigError, match="--max-model-len 128"):
        load_model(checkpoint, max_model_len=128, kv_cache_memory_bytes=memory)


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
        model = load_model(tmp_path, **arguments)
        return model.max_model_len, {op.spec for op in model.program.ops if isinstance(op, Rope)}

    memory = 64 * KV_BYTES_PER_TOKEN  # of the original context
    length, whole = frequencies()
    shortened_length, shortened = frequencies(kv_cache_memory_bytes=memory)
    asked_length, asked = frequencies(kv_cache_memory_bytes=memory, max_model_len=64)
    assert (length, shortened_length, asked_length) == (128, 64, 64)
    assert shortened == whole
    assert asked != whole


def test_the_weights_own_memory_is_not_offered_to_the_kv_cache(checkpoint, monkeypatch):
    weights = 4 * load_program(checkpoint)[1].num_parameters
    room = 4 * 32 * KV_BYTES_PER_TOKEN
    monkeypatch.setattr(load, "available_memory_bytes", lambda: weights + room)
    assert load_model(checkpoint).num_blocks == 1  # a quarter of the room
    assert load_model(checkpoint, max_model_len=128).num_blocks == 4
    monkeypatch.setattr(load, "available_memory_bytes", lambda: weights + room - 1)
    with pytest.raises(ConfigError, match="beside the weights, enough for 96 tokens"):
        load_model(checkpoint, max_model_len=128)
    monkeypatch.setattr(load, "available_memory_bytes", lambda: weights // 2)
    with pytest.raises(ConfigError, match="enough for 0 tokens"):
        load_model(checkpoint)


def test_memory_that_the_system_refuses_is_one_line(checkpoint, monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(load.ReferenceBackend, "allocate_kv", refuse)
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes: the system refuses"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"backend": "cpu"}, r"--backend: 'cpu' .*accepted: auto, reference"),
        ({"backend": "cuda"}, r"--backend: 'cuda' "),
        ({"quantization": "awq"}, r"--quantization: 'awq' "),
        ({"dtype": "int8"}, r"--dtype: 'int8' .*auto, float32, float16, bfloat16"),
        ({"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype: 'fp8' .*auto, float32, float16, bfloat16"),
        ({"kv_cache_dtype": ""}, r"--kv-cache-dtype: '' "),
        ({"max_model_len": 129}, r"--max-model-len.*128"),
        ({"max_model_len": 0}, r"--max-model-len"),
        ({"block_size": 0}, r"--block-size: must be 1 or more"),
        ({"max_num_seqs": 0}, r"--max-num-seqs: must be 1 or more"),
        ({"kv_cache_memory_bytes": -1}, r"--kv-cache-memory-bytes: must be 1 or more"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_weight_is_read(checkpoint, argument, message):
    def never(done, total):
        raise AssertionError("weights were read")

    with pytest.raises(ConfigError, match=message):
        load_model(checkpoint, on_progress=never, **argument)


def test_a_directory_without_a_model_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)
