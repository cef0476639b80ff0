"""What a checkpoint's directory holds is named as what it is, whichever file it stands for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duetto.build import build
from duetto.checkpoints.weight_files import INDEX, SINGLE, weight_files
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    SINGLE,
    INDEX,
)
STANDS_FOR: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a named pipe"),
    "a directory": (Path.mkdir, "is a directory"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "a pointer": (lambda file: file.write_text(POINTER), "is a git-LFS pointer"),
    "a link": (lambda file: file.symlink_to("../blobs/12ab"), "is a link to ../blobs/12ab, which"),
}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(model: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        build(model, EngineArgs())
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("what", STANDS_FOR)
@pytest.mark.parametrize("name", FILES)
def test_each_file_is_named_as_what_it_is_instead(model: Path, name: str, what: str) -> None:
    file, (put, cause) = model / name, STANDS_FOR[what]
    file.unlink(missing_ok=True)
    if name == INDEX:
        (model / SINGLE).unlink()
    put(file)
    error = refusal(model)
    assert error.file == file
    assert error.cause.startswith(cause)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", FILES[:-1])
def test_a_file_of_another_user_is_refused(model: Path, name: str) -> None:
    if not (model / name).exists():
        (model / name).write_text("{}")
    os.chown(model / name, 54_321, -1)
    error = refusal(model)
    assert (error.file, "belongs to user 54321" in error.cause) == (model / name, True)


def split(model: Path, count: int = 2) -> list[Path]:
    """The weights in shards, with their index."""
    tensors = load_file(model / SINGLE)
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / SINGLE).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return [model / name for name in sorted(set(weight_map.values()))]


@pytest.mark.parametrize("missing", [[0], [1], [0, 1]])
def test_a_whole_file_wins_over_an_index_of_which_shards_are_missing(
    model: Path, missing: list[int]
) -> None:
    whole = (model / SINGLE).read_bytes()
    shards = split(model)
    (model / SINGLE).write_bytes(whole)
    assert [file for file, _ in weight_files(model)] == shards
    for index in missing:
        shards[index].unlink()
    assert list(weight_files(model)) == [(model / SINGLE, None)]
    (model / SINGLE).unlink()
    error = refusal(model)
    assert (error.file, error.cause) == (
        shards[missing[0]],
        f"is missing, but {INDEX} names it",
    )


@pytest.mark.parametrize("what", ["a link", "a pointer"])
def test_a_whole_file_wins_over_shards_that_were_not_fetched(model: Path, what: str) -> None:
    whole = (model / SINGLE).read_bytes()
    _, second = split(model)
    (model / SINGLE).write_bytes(whole)
    second.unlink()
    STANDS_FOR[what][0](second)
    assert list(weight_files(model)) == [(model / SINGLE, None)]


def test_a_whole_file_wins_over_an_index_that_leads_nowhere(model: Path) -> None:
    (model / INDEX).symlink_to("nowhere")
    assert list(weight_files(model)) == [(model / SINGLE, None)]


@pytest.mark.parametrize(
    ("what", "cause"),
    [("a link", "is a link to"), ("a pointer", "is a git-LFS"), ("a pipe", "is a named pipe")],
)
def test_a_shard_is_named_as_what_it_is_instead(model: Path, what: str, cause: str) -> None:
    _, second = split(model)
    second.unlink()
    STANDS_FOR[what][0](second)
    error = refusal(model)
    assert error.file == second
    assert error.cause.startswith(cause)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("weights.safetensors", f"has another name than {SINGLE}"),
        ("pytorch_model.safetensors", f"has another name than {SINGLE}"),
        ("model-00001-of-00001.safetensors", f"has another name than {SINGLE}"),
        ("model-00002-of-00007.safetensors", "is shard 2 of 7 (it is the only one here)"),
        ("consolidated.safetensors", "holds weights under Mistral's own names"),
    ],
)
def test_weights_of_another_name(model: Path, name: str, cause: str) -> None:
    (model / SINGLE).rename(model / name)
    error = refusal(model)
    assert error.file == model / name
    assert error.cause.startswith(cause)


def test_shards_without_their_index(model: Path) -> None:
    split(model, 3)
    (model / INDEX).unlink()
    assert f"is shard 1 of 3 (3 of them are here), but {INDEX}" in refusal(model).cause


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter(model: Path, with_config: bool) -> None:
    (model / SINGLE).unlink()
    if not with_config:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    error = refusal(model)
    assert error.file == model / "adapter_config.json"
    assert error.cause.startswith("is an adapter of some/base, not a whole model")
    save_file({"a": np.ones(1)}, model / "adapter_model.safetensors")
    assert refusal(model).file == model / "adapter_model.safetensors"


def test_an_adapter_beside_its_model_is_passed_over(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    save_file({"a": np.ones(1)}, model / "adapter_model.safetensors")
    assert list(weight_files(model)) == [(model / SINGLE, None)]


def test_what_an_interrupted_download_left(model: Path, tmp_path: Path) -> None:
    (model / SINGLE).unlink()
    left = model / ".cache" / "huggingface" / "download" / "abc.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(3 << 20))
    assert "a download was interrupted and left 1 unfinished, 3 MiB" in refusal(model).cause
    shutil.rmtree(model / ".cache")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(model, snapshot)
    blob = snapshot.parent.parent / "blobs" / "abc.incomplete"
    blob.parent.mkdir()
    blob.write_bytes(b"a")
    assert "a download was interrupted and left 1 unfinished" in refusal(snapshot).cause
    (snapshot / "config.json").unlink()
    assert "a download was interrupted and left 1 unfinished" in refusal(snapshot).cause
