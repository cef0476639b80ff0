"""Weights from safetensors files, single or sharded. Pickles are never opened.

Every header is checked against the program before a tensor is read, so what is wrong with a
checkpoint is said at once. Knows tensors by the names that a Program gives, and no model.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  makes "bfloat16" a dtype that numpy and safetensors know by name
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from duetto.core.errors import CheckpointError
from duetto.models.decoder import EMBEDDING
from duetto.models.json_file import read_json
from duetto.program.dtype import Dtype
from duetto.program.program import Program, WeightSpec

Weights = dict[str, NDArray[Any]]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LM_HEAD = "lm_head.weight"

STORED_AS: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one tensor of the checkpoint is, and what its header says."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    handle: Any  # of the memory-mapped file


def load_weights(
    model_dir: Path,
    program: Program,
    dtype: Dtype,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """The program's weights by name, each a contiguous array of `dtype` in its WeightSpec's shape.

    `on_progress(done, total)` is called after each weight, in bytes. Raises CheckpointError,
    naming the file and the tensor, for whatever cannot be loaded as it should.
    """
    with ExitStack() as open_files:
        tensors = _open(model_dir, open_files)
        for spec in program.weights.values():
            _check(model_dir, tensors, spec)
        _check_nothing_is_left(tensors, program)
        target: np.dtype[Any] = np.dtype(dtype)
        sizes = {
            name: int(np.prod(spec.shape)) * target.itemsize
            for name, spec in program.weights.items()
        }
        total, done = sum(sizes.values()), 0
        weights: Weights = {}
        for name, spec in program.weights.items():
            weights[name] = _read(tensors, spec, target)
            done += sizes[name]
            if on_progress is not None:
                on_progress(done, total)
    return weights


def _open(model_dir: Path, open_files: ExitStack) -> dict[str, _Tensor]:
    """Map all files, and say which tensor is where. Names are with the prefix `model.`."""
    tensors: dict[str, _Tensor] = {}
    for file, indexed in _files(model_dir):
        try:
            handle = open_files.enter_context(safe_open(file, framework="numpy"))
        except FileNotFoundError:
            raise CheckpointError(file, f"is missing, but {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                file, f"is truncated or no safetensors file ({error}); download it again"
            ) from error
        names = set(handle.keys())
        wanted = names if indexed is None else indexed
        if absent := wanted - names:
            raise CheckpointError(file, f"lacks tensor {min(absent)}, which {INDEX} says it holds")
        for name in sorted(wanted):
            if other := tensors.get(_canonical(name)):
                raise CheckpointError(
                    file, f"tensors {other.stored_name} and {name} are one and the same here"
                )
            header = handle.get_slice(name)
            tensors[_canonical(name)] = _Tensor(
                file, name, tuple(header.get_shape()), header.get_dtype(), handle
            )
    return tensors


def _files(model_dir: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each safetensors file, with the tensors that the index places in it; None without an index.

    What a file holds beside them is not read: the same tensor may lie in two files.
    """
    if (model_dir / INDEX).exists():
        yield from _shards(model_dir)
    elif (model_dir / SINGLE).exists():
        yield model_dir / SINGLE, None
    elif pickles := sorted([*model_dir.glob("*.bin"), *model_dir.glob("*.pt*")]):
        raise CheckpointError(
            pickles[0],
            "is a pickle, which can run code and is never read; convert it to safetensors",
        )
    else:
        raise CheckpointError(model_dir, f"holds neither {SINGLE} nor {INDEX}")


def _shards(model_dir: Path) -> Iterator[tuple[Path, set[str]]]:
    index = read_json(model_dir / INDEX)
    weight_map = index.section("weight_map")
    if weight_map is None or not weight_map.values:
        index.refuse("weight_map", "must map each tensor to its file")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.values.items():
        # A checkpoint is untrusted input: it may name files beside it only.
        if not isinstance(file, str) or file in ("", ".", "..") or {"/", "\\", os.sep} & set(file):
            weight_map.refuse(name, f"{file!r} is not the name of a file in this directory")
        by_file.setdefault(file, set()).add(name)
    for file, names in sorted(by_file.items()):
        yield model_dir / file, names


def _canonical(name: str) -> str:
    """A base model saved without its head has no prefix `model.`."""
    return name if name == LM_HEAD or name.startswith("model.") else f"model.{name}"


def _check(model_dir: Path, tensors: Mapping[str, _Tensor], spec: WeightSpec) -> None:
    """The sources of one weight are all there, in a known dtype and in the right shape."""
    for source, rows in zip(spec.sources, spec.source_rows, strict=True):
        tensor = tensors.get(source)
        if tensor is None:
            raise CheckpointError(model_dir, f"no safetensors file here holds tensor {source}")
        if tensor.dtype not in STORED_AS.values():
            raise CheckpointError(
                tensor.file,
                f"tensor {source} is stored as {tensor.dtype}; "
                f"accepted: {', '.join(STORED_AS.values())}",
            )
        wanted = (rows, *spec.shape[1:])
        if tensor.shape != wanted:
            raise CheckpointError(
                tensor.file,
                f"tensor {source} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(wanted)}",
            )


def _check_nothing_is_left(tensors: Mapping[str, _Tensor], program: Program) -> None:
    """A tensor that no operation uses means that this is another model than config.json says."""
    used = {source for spec in program.weights.values() for source in spec.sources}
    for name, tensor in sorted(tensors.items()):
        if name in used or name.endswith("rotary_emb.inv_freq"):  # written by old exporters
            continue
        if name == LM_HEAD:  # the embeddings are tied; some exporters write them twice
            if not _are_equal(tensor, tensors[EMBEDDING]):
                raise CheckpointError(
                    tensor.file,
                    f"tensor {LM_HEAD} differs from {EMBEDDING}, but config.json says "
                    f"tie_word_embeddings: true",
                )
            continue
        raise CheckpointError(
            tensor.file, f"tensor {tensor.stored_name} is not part of the model in config.json"
        )


def _are_equal(a: _Tensor, b: _Tensor) -> bool:
    return a.shape == b.shape and np.array_equal(_tensor(a), _tensor(b))


def _tensor(tensor: _Tensor) -> NDArray[Any]:
    return tensor.handle.get_tensor(tensor.stored_name)  # type: ignore[no-any-return]


def _read(tensors: Mapping[str, _Tensor], spec: WeightSpec, target: np.dtype[Any]) -> NDArray[Any]:
    if len(spec.sources) == 1:
        return _tensor(tensors[spec.sources[0]]).astype(target, copy=False)
    weight = np.empty(spec.shape, target)
    start = 0
    for source, rows in zip(spec.sources, spec.source_rows, strict=True):
        weight[start : start + rows] = _tensor(tensors[source])
        start += rows
    return weight
