"""Weights from safetensors files: what is read, in which form, and what is refused beforehand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from duetto.checkpoints.checkpoint import Checkpoint, load_weights
from duetto.checkpoints.weight_files import INDEX
from duetto.core.errors import CheckpointError
from duetto.models.programs import load_program

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
LAYER = "model.layers.0"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 8),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.weight": (4, 8),
    f"{LAYER}.self_attn.v_proj.weight": (4, 8),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.post_attention_layernorm.weight": (8,),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}
QKV = f"{LAYER}.self_attn.q_proj.weight"
Tensors = dict[str, NDArray[Any]]


def tensors(dtype: Any = np.float32) -> Tensors:
    random = np.random.RandomState(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write(directory: Path, contents: Tensors, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(contents, directory / "model.safetensors")
    return directory


def write_shards(directory: Path, contents: Tensors) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = {name: contents[name] for name in sorted(contents)[shard::3]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def load(directory: Path, dtype: Any = "float32", **arguments: Any) -> Tensors:
    return load_weights(directory, load_program(directory)[1], dtype, **arguments)


def refusal(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_from_every_dtype(tmp_path: Path, stored: Any, dtype: Any) -> None:
    contents = tensors(stored)
    weights = load(write(tmp_path, contents), dtype)
    wanted = np.dtype(dtype)
    assert {array.dtype for array in weights.values()} == {wanted}
    parts = [contents[QKV.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_array_equal(weights[QKV], np.concatenate(parts).astype(wanted))
    head = contents["lm_head.weight"]
    np.testing.assert_array_equal(weights["lm_head.weight"], head.astype(wanted))
    assert all(array.flags.c_contiguous for array in weights.values())


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = load(write(tmp_path / "one", tensors()))
    many = load(write_shards(tmp_path / "many", tensors()))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        np.testing.assert_array_equal(weight, many[name])


def test_names_without_the_prefix_of_a_model_with_a_head(tmp_path: Path) -> None:
    contents = tensors()
    bare = {name.removeprefix("model."): array for name, array in contents.items()}
    weights = load(write(tmp_path, bare))
    np.testing.assert_array_equal(weights["model.norm.weight"], contents["model.norm.weight"])


def test_tied_embeddings_are_one_weight(tmp_path: Path) -> None:
    contents = tensors()
    del contents["lm_head.weight"]
    weights = load(write(tmp_path, contents, tie_word_embeddings=True))
    assert "lm_head.weight" not in weights
    # Some exporters write them twice; alike is harmless, different is not.
    contents["lm_head.weight"] = contents["model.embed_tokens.weight"]
    assert load(write(tmp_path, contents, tie_word_embeddings=True)).keys() == weights.keys()
    contents["lm_head.weight"] = contents["lm_head.weight"] + 1
    error = refusal(write(tmp_path, contents, tie_word_embeddings=True))
    assert "lm_head.weight differs from model.embed_tokens.weight" in error.cause


def test_progress_goes_up_to_the_bytes_of_all_weights(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    weights = load(
        write(tmp_path, tensors()), "bfloat16", on_progress=lambda *call: calls.append(call)
    )
    total = sum(array.nbytes for array in weights.values())
    assert len(calls) == len(weights)
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(contents: Tensors) -> None:
        contents[new] = contents.pop(old)

    return change


def replace(name: str, array: NDArray[Any]) -> Callable[[Tensors], None]:
    return lambda contents: contents.update({name: array})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (rename(QKV, f"{LAYER}.self_attn.rotary_emb.inv_freq"), f"holds tensor {QKV}"),
        (rename("lm_head.weight", "model.rotary_emb.inv_freq"), "holds tensor lm_head.weight"),
        (
            replace(QKV, np.zeros((4, 8), np.float32)),
            f"tensor {QKV} has shape [4, 8], but config.json asks for [8, 8]",
        ),
        (replace("model.norm.weight", np.zeros((), np.float32)), "has shape []"),
        (replace("model.norm.weight", np.zeros(8, np.int8)), "is stored as I8; accepted: F32"),
        (
            replace(f"{LAYER}.self_attn.q_proj.bias", np.zeros(8, np.float32)),
            f"tensor {LAYER}.self_attn.q_proj.bias is not part of the model in config.json",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[Tensors], None], cause: str
) -> None:
    contents = tensors()
    change(contents)
    assert cause in str(refusal(write(tmp_path, contents)))


def test_shapes_are_checked_one_by_one_even_where_the_sum_is_right(tmp_path: Path) -> None:
    contents = tensors()
    for name, rows in (("q_proj", 6), ("k_proj", 6)):
        contents[QKV.replace("q_proj", name)] = np.zeros((rows, 8), np.float32)
    assert f"{QKV} has shape [6, 8]" in str(refusal(write(tmp_path, contents)))


def test_frequencies_that_old_exporters_wrote_are_passed_over(tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.rotary_emb.inv_freq"
    weights = load(write(tmp_path, tensors() | {name: np.ones(2, np.float32)}))
    assert weights and name not in weights


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    error = refusal(tmp_path)
    assert error.file == file
    assert "truncated" in error.cause


def test_a_page_of_html_instead_of_weights(tmp_path: Path) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    file.write_text("<html>not found</html>")
    assert "no safetensors file" in refusal(tmp_path).cause


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path: Path) -> None:
    second = write_shards(tmp_path, tensors()) / "model-00002-of-00003.safetensors"
    contents = load_file(second)
    dropped = contents.popitem()[0]
    save_file(contents, second)
    assert refusal(tmp_path).cause == f"lacks tensor {dropped}, which {INDEX} says it holds"
    second.unlink()
    error = refusal(tmp_path)
    assert (error.file, error.cause) == (second, f"is missing, but {INDEX} names it")


def test_a_tensor_comes_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    contents = tensors()
    write_shards(tmp_path, contents)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for file in set(index.values()):  # each also holds another's tensors, with other numbers
        more = {name: array + 1 for name, array in contents.items()}
        save_file(more | load_file(tmp_path / file), tmp_path / file)
    weights = load(tmp_path)
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(weights[name], contents[name])


def test_a_tensor_that_stands_twice(tmp_path: Path) -> None:
    contents = tensors() | {"norm.weight": np.ones(8, np.float32)}
    error = refusal(write(tmp_path, contents))
    assert error.file == tmp_path / "model.safetensors"
    assert error.cause == "tensors model.norm.weight and norm.weight are one and the same here"


def test_a_tensor_that_stands_twice_in_two_files(tmp_path: Path) -> None:
    write_shards(tmp_path, tensors() | {"norm.weight": np.ones(8, np.float32)})
    assert "tensors norm.weight and model.norm.weight are" in refusal(tmp_path).cause


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "sub/x", "..\\x", "..", "", 7,
                                  "a" * 300, "é" * 200, "a\0b", "a\ud800"])  # fmt: skip
def test_an_index_may_name_files_beside_it_only(tmp_path: Path, path: Any) -> None:
    write_shards(tmp_path, tensors())
    write_index(tmp_path, {"model.norm.weight": path})
    error = refusal(tmp_path)
    assert error.file == tmp_path / INDEX
    assert "not the name of a file in this directory" in error.cause


@pytest.mark.parametrize("content", ["{", '{"weight_map": {}}', '{"weight_map": []}', "{}"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, tensors())
    (tmp_path / INDEX).write_text(content)
    assert refusal(tmp_path).file == tmp_path / INDEX


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (write(tmp_path, tensors()) / "model.safetensors").unlink()
    assert "holds neither" in refusal(tmp_path).cause
    # Unpickling this would raise another error, or worse.
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    error = refusal(tmp_path)
    assert error.file == tmp_path / "pytorch_model.bin"
    assert "never read" in error.cause


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_told_with_their_tensor_and_place(
    tmp_path: Path, stored: Any, bad: float
) -> None:
    contents = tensors(stored)
    name = f"{LAYER}.mlp.up_proj.weight"  # the second of a stack
    contents[name][7, 3] = bad
    error = refusal(write(tmp_path, contents))
    assert error.file == tmp_path / "model.safetensors"
    assert error.cause.startswith(f"tensor {name} holds {np.float32(bad)} at [7, 3] as float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_numbers_of_a_dtype_are_numbers(tmp_path: Path, dtype: Any) -> None:
    contents = tensors(np.dtype(dtype))
    largest = ml_dtypes.finfo(dtype).max
    contents["lm_head.weight"][:, 0] = largest
    contents["lm_head.weight"][:, 1] = -largest
    loaded = load(write(tmp_path, contents), dtype)["lm_head.weight"]
    assert (loaded[:, 0] == largest).all() and (loaded[:, 1] == -largest).all()


def test_a_number_that_is_too_large_for_the_dtype_is_told_and_not_made_infinite(
    tmp_path: Path,
) -> None:
    contents = tensors()
    contents["model.norm.weight"][2] = 7e4
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds inf at \[2\] as float16"):
        load(write(tmp_path, contents), "float16")


def fingerprint(directory: Path) -> str:
    with Checkpoint(directory, load_program(directory)[1]) as checkpoint:
        return checkpoint.fingerprint()


def test_a_fingerprint_sees_a_change_of_bytes_time_and_header(tmp_path: Path) -> None:
    contents = tensors()
    file = write(tmp_path, contents) / "model.safetensors"
    before, times = fingerprint(tmp_path), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert fingerprint(tmp_path) == before
    contents["model.norm.weight"][3] += 1
    save_file(contents, file)
    os.utime(file, ns=times)  # so that only the bytes differ
    changed = fingerprint(tmp_path)
    os.utime(file, ns=(times[0], times[1] + 1))
    touched = fingerprint(tmp_path)
    save_file(contents, file, metadata={"made_by": "another"})
    os.utime(file, ns=times)
    assert len({before, changed, touched, fingerprint(tmp_path)}) == 4


def test_a_copy_has_the_same_fingerprint_without_times(tmp_path: Path) -> None:
    contents = tensors()
    found = set()
    for place, name in enumerate(("here", "there")):
        (tmp_path / name).mkdir()
        file = write(tmp_path / name, contents) / "model.safetensors"
        os.utime(file, ns=(place, place))
        with Checkpoint(file.parent, load_program(file.parent)[1]) as checkpoint:
            assert checkpoint.fingerprint() != checkpoint.fingerprint(is_dated=False)
            found.add(checkpoint.fingerprint(is_dated=False))
    contents["model.norm.weight"][3] += 1
    write(tmp_path / "there", contents)
    with Checkpoint(tmp_path / "there", load_program(tmp_path / "there")[1]) as checkpoint:
        found.add(checkpoint.fingerprint(is_dated=False))
    assert len(found) == 2


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    with Checkpoint(tmp_path, load_program(tmp_path)[1]) as checkpoint:
        os.truncate(file, file.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="was cut short while it was read"):
            list(checkpoint.weights("float32"))
