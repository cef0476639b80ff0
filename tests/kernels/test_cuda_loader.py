"""A checkpoint, served by the GPU backend in Triton's interpreter: the reference's answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from duetto import LLM, SamplingParams
from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.sizes import held_bytes
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError
from duetto.runner.load import LoadedModel, load_model
from duetto.runner.proposers.draft_model import DraftModelProposer

ARGS = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_model_len": 64,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 2**19,
}
PROMPTS = ["a lantern", "the quick brown fox"]
GREEDY = SamplingParams(max_tokens=4, temperature=0)


def load(model: Path, **changes) -> LoadedModel:
    return load_model(model, EngineArgs(backend="cuda", **{**ARGS, **changes}))


def test_the_same_tokens_as_the_reference(tiny_model):
    found = {}
    for backend in ("reference", "cuda"):
        with LLM(tiny_model, backend=backend, **ARGS) as llm:
            outputs = llm.generate(PROMPTS, GREEDY)
            found[backend] = [each.outputs[0].token_ids for each in outputs]
    assert found["cuda"] == found["reference"]


def test_the_device_samples_what_the_host_would(tiny_model):
    """Who asks for log-probabilities is sampled on the host, from the same logits. A step is in
    flight, and the first two go on from what the device has sampled."""
    kinds = [{"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.3, "top_k": 12, "min_p": 0.01}]
    with LLM(tiny_model, backend="cuda", **ARGS) as llm:
        assert llm._built.model.runner.depth == 1
        found = []
        for logprobs in (None, 1):
            params = [
                SamplingParams(max_tokens=3, seed=seed, logprobs=logprobs, **kind)
                for seed, kind in enumerate(kinds)
            ]
            found.append([each.outputs[0].token_ids for each in llm.generate(PROMPTS, params)])
    assert found[0] == found[1]


def test_a_draft_model_beside_it_changes_no_token(tiny_model, monkeypatch):
    """Its own draft, so that what it proposes is accepted."""
    drafts, propose = [], DraftModelProposer.propose

    def watched(proposer, requests):
        drafts.extend(found := propose(proposer, requests))
        return found

    monkeypatch.setattr(DraftModelProposer, "propose", watched)
    speculative = {"model": str(tiny_model), "num_speculative_tokens": 2}
    found = []
    for options in ({}, {"speculative_config": speculative}):
        with LLM(tiny_model, backend="cuda", **{**ARGS, "max_num_seqs": 1, **options}) as llm:
            found.append(llm.generate(PROMPTS[:1], GREEDY)[0].outputs[0].token_ids)
    assert found[0] == found[1]
    assert found[0][2] in [token for each in drafts for token in each]


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_what_is_predicted_of_weights_and_kv_is_taken(tiny_model, quantization):
    loaded = load(tiny_model, quantization=quantization, kv_cache_dtype="fp8")
    backend = loaded.runner.backend
    assert isinstance(backend, CudaBackend)
    assert loaded.computed_by.startswith("cuda/interpreter/")
    assert loaded.quantization == quantization
    weights = backend._held.weights
    assert weights.num_bytes <= loaded.weight_bytes < weights.num_bytes * 1.2
    arena = loaded.runner._kv
    tensors = [tensor for layer in arena.layers for tensor in layer if tensor is not None]
    taken = sum(tensor.nbytes for tensor in tensors)
    assert taken == loaded.kv_memory_bytes * (loaded.num_blocks + 1) // loaded.num_blocks


def test_what_is_predicted_of_steps_is_held(tiny_model):
    loaded = load(tiny_model)
    backend = loaded.runner.backend
    held = backend._held
    tensors = [*held.buffers.values(), *held.partials[:3], *backend._scratch[1:]]
    tensors += [tensor for rotation in held.rotations.values() for tensor in rotation]
    taken = sum(tensor.nbytes for tensor in tensors)
    predicted = held_bytes(loaded.program, backend._limits, 4)
    assert 0.9 * predicted <= taken <= predicted


def test_half_precision_is_not_widened(tiny_model):
    loaded = load(tiny_model, dtype="float16")
    assert (loaded.dtype, loaded.kv_dtype) == ("float16", "float16")
    assert loaded.precision.activation_bytes == 4  # the interpreter's device is this machine
    backend = loaded.runner.backend
    buffers = {name: buffer.dtype for name, buffer in backend._held.buffers.items()}
    assert buffers.pop(loaded.program.logits.buffer) == torch.float32
    assert set(buffers.values()) == {torch.float16}
    assert {matrix.data.dtype for matrix in backend._held.weights.matrices.values()} == {
        torch.float16
    }


def test_weights_that_are_no_numbers_are_named(tiny_model, tmp_path):
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    spoiled = tensors[name].copy()
    spoiled[1, 2] = np.nan
    save_file(tensors | {name: spoiled}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds nan at"):
        load(tmp_path)
