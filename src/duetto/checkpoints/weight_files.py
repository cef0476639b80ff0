"""Which files of a directory hold the weights, or what it holds instead. Opens no weights."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shown

from duetto.checkpoints.checkpoint_file import is_pointer, is_there, read_text_part, unfinished
from duetto.checkpoints.json_file import read_json
from duetto.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"  # the tensor that every checkpoint has
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_MAX_NAME_BYTES = 255  # of a file, on all systems that are usual
_SHARD = re.compile(r".*-0*(\d+)-of-0*(\d+)\.safetensors")
_BASE_MODEL = re.compile(r'"base_model_name_or_path"\s*:\s*"([^"]{1,200})"')


def weight_files(model_dir: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each safetensors file, with the tensors that the index places in it; None without an index.

    What a file holds beside them is not read: the same tensor may lie in two files. An index of
    which a shard is missing, or was not fetched, counts for nothing beside a whole SINGLE: it was
    left behind by an older way of saving. Raises CheckpointError, naming what is there instead.
    """
    single, index = model_dir / SINGLE, model_dir / INDEX
    if not is_there(index) or (single.exists() and not index.exists()):
        if not is_there(single):
            raise _without_weights(model_dir)
        yield single, None
        return
    shards = _shards(index)
    missing = [file for file in shards if not file.exists()]
    if single.exists() and (missing or any(map(is_pointer, shards))):
        yield single, None
        return
    for file in missing:
        if not file.is_symlink():  # of which opening it tells more
            raise CheckpointError(file, f"is missing, but {INDEX} names it{unfinished(model_dir)}")
    yield from shards.items()


def adapter_in(model_dir: Path) -> CheckpointError | None:
    """What to raise if the directory holds a LoRA adapter and no model."""
    file = next(
        (
            model_dir / name
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
            if is_there(model_dir / name)
        ),
        None,
    )
    if file is None:
        return None
    base = None
    if is_there(model_dir / ADAPTER_CONFIG):
        base = _BASE_MODEL.search(read_text_part(model_dir / ADAPTER_CONFIG))
    of = f" of {base.group(1)}" if base else ""
    return CheckpointError(
        file, f"is an adapter{of}, not a whole model; merge it into its model and save that"
    )


def files_in_index(index_file: Path) -> list[str]:
    """The names of the shards. Raises CheckpointError for an index that is none."""
    return [file.name for file in _shards(index_file)]


def _shards(index_file: Path) -> dict[Path, set[str] | None]:
    """Each shard with its tensors, in the order of their names."""
    index = read_json(index_file)
    weight_map = index.section("weight_map")
    if weight_map is None or not weight_map.values:
        index.refuse("weight_map", "must map each tensor to its file")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.values.items():
        # A checkpoint is untrusted input: it may name files beside it only.
        if not _is_file_name(file):
            weight_map.refuse(name, f"{shown(file)} is not the name of a file in this directory")
        by_file.setdefault(file, set()).add(name)
    return {index_file.parent / file: names for file, names in sorted(by_file.items())}


def _is_file_name(name: object) -> bool:
    """Whether a system can have a file of this name in a directory."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if {"/", "\\", os.sep, "\0"} & set(name):
        return False
    try:
        return len(name.encode()) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _without_weights(model_dir: Path) -> CheckpointError:
    """What a directory holds that has neither SINGLE nor INDEX."""
    others = sorted(
        file for file in model_dir.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS
    )
    if others:
        return CheckpointError(others[0], _other_name(others))
    if (adapter := adapter_in(model_dir)) is not None:
        return adapter
    left = unfinished(model_dir)
    pickles = sorted([*model_dir.glob("*.bin"), *model_dir.glob("*.pt*")])
    if pickles and not left:
        return CheckpointError(
            pickles[0],
            "is a pickle, which can run code and is never read; convert it to safetensors",
        )
    return CheckpointError(model_dir, f"holds neither {SINGLE} nor {INDEX}{left}")


def _other_name(files: list[Path]) -> str:
    name = files[0].name
    if name.startswith("consolidated"):
        return f"holds weights under Mistral's own names; what is read is {SINGLE} or {INDEX}"
    if shard := _SHARD.fullmatch(name):
        number, count = map(int, shard.groups())
        if count > 1:
            there = (
                f"{len(files)} of them are here" if len(files) > 1 else "it is the only one here"
            )
            return (
                f"is shard {number} of {count} ({there}), but {INDEX}, which lists them, is missing"
            )
    elif len(files) > 1:
        return (
            f"is one of {len(files)} safetensors files, but {INDEX}, which lists them, is missing"
        )
    return f"has another name than {SINGLE}; rename it if it holds all weights"
