"""A made checkpoint is complete, deterministic, and what its shape says."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from duetto.checkpoints.checkpoint import load_weights
from duetto.checkpoints.config import parse_config, read_generation_config
from duetto.checkpoints.json_file import JsonSection
from duetto.checkpoints.shapes import SHAPES
from duetto.checkpoints.tokenizer import load_tokenizer
from duetto.core.errors import CheckpointError, ConfigError
from duetto.models import make_model as module
from duetto.models.make_model import MIN_VOCAB_SIZE, make_model
from duetto.models.programs import build_program, load_program
from duetto.program.dtype import DTYPES, Dtype

TINY = SHAPES["tiny"]
SMALL = {**TINY, "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def little_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRAINING_CHARACTERS", 50_000)


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    # As published on the models' pages.
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(
    shape: str, num_parameters: int
) -> None:
    config = parse_config(JsonSection(Path(shape), SHAPES[shape]))
    assert build_program(config).num_parameters == num_parameters


def test_tiny_loads_and_speaks(tmp_path: Path) -> None:
    made = make_model(TINY, tmp_path)
    config, program = load_program(tmp_path)
    weights = load_weights(tmp_path, program, "float32")
    assert made.num_parameters == program.num_parameters
    assert set(made.file_bytes) == {f.name for f in tmp_path.iterdir()}
    tokenizer = load_tokenizer(
        tmp_path, eos_token_ids=config.eos_token_ids, vocab_size=program.vocab_size
    )
    assert tokenizer.vocab_size == made.num_tokens == 1024
    assert read_generation_config(tmp_path).eos_token_ids == (2, 0)
    prompt = tokenizer.render_chat([{"role": "user", "content": "Naïve 你好"}])
    assert prompt == "<|im_start|>user\nNaïve 你好<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt)
    assert (ids[0], ids.count(2)) == (1, 1)
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    assert tokenizer.eos_token_ids == {2}
    norm = weights["model.norm.weight"]
    assert (norm == 1).all()
    matrix = weights["model.layers.0.mlp.down_proj.weight"]
    assert abs(matrix.std() / TINY["initializer_range"] - 1) < 0.05
    assert abs(matrix.mean()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_seed_gives_the_same_bytes(dtype: Dtype, tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    make_model(SMALL, first, dtype=dtype)
    make_model(SMALL, again, dtype=dtype)
    make_model(SMALL, other, dtype=dtype, seed=1)
    assert digests(first) == digests(again)
    changed = {n for n, digest in digests(first).items() if digests(other)[n] != digest}
    assert changed == {"model.safetensors"}
    assert json.loads((first / "config.json").read_text())["torch_dtype"] == dtype


def test_shards_hold_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    seen: list[tuple[int, int]] = []
    make_model(TINY, whole)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1000)  # parts do not change the numbers
    make_model(
        TINY,
        sharded,
        max_shard_bytes=50_000,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    names = sorted(f.name for f in sharded.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors" and len(names) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert seen[-1] == (index["metadata"]["total_size"],) * 2
    assert seen == sorted(seen)
    _, program = load_program(whole)
    a, b = load_weights(whole, program, "float32"), load_weights(sharded, program, "float32")
    assert all(np.array_equal(a[name], b[name]) for name in a)


BASE = {key: value for key, value in SMALL.items() if key not in ("architectures", "head_dim")}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": 0, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_any_model_type(model_type: str, tmp_path: Path) -> None:
    make_model({**BASE, "model_type": model_type, **OTHERS[model_type]}, tmp_path)
    _, program = load_program(tmp_path)
    weights = load_weights(tmp_path, program, "float32")
    norm = weights["model.norm.weight"]
    assert (norm == (0 if model_type.startswith("gemma") else 1)).all()
    if model_type == "qwen2":
        assert weights["model.layers.0.self_attn.q_proj.bias"].std() > 0.1


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", OTHERS)
def test_transformers_loads_it(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  an extra

    made = make_model({**BASE, "model_type": model_type, **OTHERS[model_type]}, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.num_parameters() == made.num_parameters
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Naïve 你好  def f():\n\treturn"}]
    prompt = ours.render_chat(messages)
    kwargs = {"tokenize": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(messages, **kwargs) == prompt
    assert theirs.encode(prompt) == ours.encode(prompt)
    assert {theirs.eos_token_id} == ours.eos_token_ids


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1 << 16)
    program = build_program(
        parse_config(JsonSection(Path("x"), {**TINY, "vocab_size": 100_000, "hidden_size": 128}))
    )
    tracemalloc.start()
    try:
        module.write_weights(program, tmp_path, "bfloat16", seed=0, std=0.1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 25_000_000
    assert peak < 4_000_000


def test_vocabulary_of_ones_own(tmp_path: Path) -> None:
    made = make_model(TINY, tmp_path / "a", vocab_size=5000)
    assert made.num_tokens == 2000  # training more is slow and serves nobody
    with safe_open(tmp_path / "a" / "model.safetensors", framework="numpy") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [5000, 64]
    assert make_model(TINY, tmp_path / "b", vocab_size=MIN_VOCAB_SIZE).num_tokens == MIN_VOCAB_SIZE
    with pytest.raises(ConfigError, match=r"vocab_size: 258 has no room .* at least 259 is needed"):
        make_model(TINY, tmp_path / "c", vocab_size=258)
    with pytest.raises(CheckpointError, match="vocab_size: must be a whole number from 1 to"):
        make_model(TINY, tmp_path / "c", vocab_size=0)
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    make_model(SMALL, tmp_path / "model", max_shard_bytes=10_000)
    before = digests(tmp_path / "model")
    with pytest.raises(ConfigError, match="is not empty; --force replaces"):
        make_model(SMALL, tmp_path / "model", seed=1)
    assert digests(tmp_path / "model") == before
    make_model(SMALL, tmp_path / "model", seed=1, force=True)
    _, program = load_program(tmp_path / "model")
    load_weights(tmp_path / "model", program, "bfloat16")  # no old shards, no old index
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1

    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds no model that --force could replace"):
        make_model(SMALL, papers, force=True)
    with pytest.raises(ConfigError, match="is a file; a directory"):
        make_model(SMALL, papers / "thesis.txt", force=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        make_model(SMALL, papers / "thesis.txt" / "below")


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out, fresh = tmp_path / "out", tmp_path / "fresh"
    make_model(SMALL, out, seed=2, max_shard_bytes=10_000)
    for _ in range(2):  # what was interrupted can be replaced, and interrupted again
        with pytest.raises(KeyboardInterrupt):
            make_model(SMALL, out, force=True, on_progress=stop)
        with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
            load_program(out)
    with pytest.raises(ConfigError, match="is not empty; --force replaces"):
        make_model(SMALL, out)
    make_model(SMALL, out, force=True)
    make_model(SMALL, fresh)
    assert digests(out) == digests(fresh)


def test_weights_without_a_config_are_not_ours_to_replace(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="holds no model that --force could replace"):
        make_model(SMALL, tmp_path, force=True)
    assert digests(tmp_path).keys() == {"model.safetensors"}


def test_repeated_numbers_fill_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1000)
    make_model(SMALL, tmp_path / "drawn")
    make_model(SMALL, tmp_path / "repeated", repeats=True)
    _, program = load_program(tmp_path / "repeated")
    drawn = load_weights(tmp_path / "drawn", program, "bfloat16")
    repeated = load_weights(tmp_path / "repeated", program, "bfloat16")
    for name, weight in repeated.items():
        numbers = np.asarray(weight, np.float32)
        assert numbers.shape == drawn[name].shape
        if numbers.ndim == 2:
            assert numbers.ravel()[:100].std() > 0.01
            assert len(np.unique(numbers)) <= 1000
