"""What is fetched from a hub, what is told meanwhile, and what is said of what is missing."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints.fake_hub import MAIN, OLD, FakeHub, serving

from duetto.build import build, find_checkpoint
from duetto.checkpoints import hub
from duetto.checkpoints.weight_files import INDEX, SINGLE
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WHOLE = b"w" * 200_000
# What repositories hold beside what is read.
BESIDE = {
    "README.md": b"r",
    "consolidated.safetensors": WHOLE,
    "consolidated-00001-of-00001.safetensors": WHOLE,
    "model.fp16.safetensors": WHOLE,
    "pytorch_model.bin": WHOLE,
    "original/consolidated.00.pth": WHOLE,
    "onnx/model.safetensors": WHOLE,
    "adapter/adapter_model.safetensors": WHOLE,
    "onnx/config.json": b"{}",
    "training_args.json": b"{}",
    "model.gguf": WHOLE,
}


@pytest.fixture
def small(tiny_model: Path) -> dict[str, bytes]:
    """The files of a model that loads, without its weights."""
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir() if file.is_file()}
    return {name: data for name, data in files.items() if name in hub.SMALL_FILES}


@pytest.fixture
def fake(small: dict[str, bytes]) -> Iterator[FakeHub]:
    made = FakeHub()
    made.files[MAIN] = {**BESIDE, **small, SINGLE: WHOLE}
    with serving(made):
        yield made


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    shards = {name: WHOLE[:-1] + str(number).encode() for number, name in enumerate(SHARDS)}
    kept = {name: data for name, data in files.items() if name != SINGLE}
    return kept | shards | {INDEX: json.dumps(index).encode()}


def get(fake: FakeHub, cache: Path, revision: str | None = None, **more: Any) -> Path:
    return hub.download("some/model", revision, endpoint=fake.url, cache_dir=cache, **more)


def refusal(fake: FakeHub, cache: Path, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        get(fake, cache, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", ["one file", "shards", "both"])
def test_one_set_of_weights_is_fetched(
    fake: FakeHub, small: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    if way != "one file":
        fake.files[MAIN] = sharded(fake.files[MAIN]) | ({SINGLE: WHOLE} if way == "both" else {})
    weights = {*SHARDS, INDEX} if way == "shards" else {SINGLE}
    found = get(fake, tmp_path)
    assert {str(file.relative_to(found)) for file in found.rglob("*")} == {*small, *weights}
    assert sorted(fake.served) == sorted({*small, *weights})
    assert found.name == MAIN


def test_a_second_time_nothing_is_fetched(fake: FakeHub, tmp_path: Path) -> None:
    first = get(fake, tmp_path)
    fake.served.clear()
    assert get(fake, tmp_path) == first
    assert fake.served == []


def test_without_the_hub_the_cache_serves(fake: FakeHub, tmp_path: Path) -> None:
    fake.files[MAIN] = sharded(fake.files[MAIN])
    found = get(fake, tmp_path)
    away = FakeHub()
    away.url = "http://127.0.0.1:9"  # nobody listens
    assert get(away, tmp_path) == found
    # A cache that another program has filled has no list of the files.
    for file in (found.parent.parent / "trees").glob("*"):
        file.unlink()
    assert get(away, tmp_path) == found
    (found / SHARDS[1]).unlink()
    message = refusal(away, tmp_path)
    assert SHARDS[1] in message
    assert "run it again to go on" in message
    assert "cannot be reached" in refusal(away, tmp_path / "empty")


def test_a_revision_is_pinned(fake: FakeHub, small: dict[str, bytes], tmp_path: Path) -> None:
    fake.files[OLD] = {**small, SINGLE: b"old"}
    for revision in ("v1", OLD):
        found = get(fake, tmp_path, revision)
        assert (found.name, (found / SINGLE).read_bytes()) == (OLD, b"old")
    assert (get(fake, tmp_path) / SINGLE).read_bytes() == WHOLE
    for strange in ("v2", "c" * 40):
        assert f"--revision: '{strange}' is no" in refusal(fake, tmp_path, strange)


def test_a_directory_has_no_revision(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="--revision: is for models on the hub"):
        build(tiny_model, EngineArgs(revision="main"))
    with pytest.raises(ConfigError, match="--revision: must be"):
        EngineArgs(revision="")


def test_the_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(*arguments: object) -> Path:
        asked.append(arguments[:2])
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    assert find_checkpoint("some/model", "v1") == tmp_path
    assert asked == [("some/model", "v1")]


def test_a_broken_download_says_what_is_missing_and_goes_on(fake: FakeHub, tmp_path: Path) -> None:
    fake.files[MAIN] = sharded(fake.files[MAIN])
    fake.cut = {SHARDS[1]}
    message = refusal(fake, tmp_path)
    assert "some/model: the download was interrupted (" in message
    assert f"missing: {SHARDS[1]} (195.3 KiB)" in message
    fake.cut.clear()
    fake.served.clear()
    found = get(fake, tmp_path)
    assert SHARDS[1] in fake.served
    assert (found / SHARDS[1]).stat().st_size == len(WHOLE)


def test_ctrl_c_says_what_is_missing(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(work: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_in_a_thread", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted: 0 of \d files .* missing: config"):
        get(fake, tmp_path)


def test_an_interruption_ends_what_the_client_does() -> None:
    interrupted = threading.Event()
    bar = hub._silent(interrupted)(total=10)
    bar.update(1)
    interrupted.set()
    with pytest.raises(ConnectionAbortedError):
        bar.update(1)


def test_how_far_it_is_goes_up_to_all(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_LOOK_S", 0.001)
    told: list[tuple[int, int]] = []
    get(fake, tmp_path, on_progress=lambda done, total: told.append((done, total)))
    last = [done for done, total in told if total == len(WHOLE)]
    assert last[0] == 0
    assert all(0 <= done <= total for done, total in told)


def test_what_cannot_be_served_is_not_fetched(
    fake: FakeHub, small: dict[str, bytes], tmp_path: Path
) -> None:
    files = fake.files[MAIN]
    fake.files[MAIN] = files | {"config.json": b'{"model_type": "mamba"}'}
    assert "mamba" in refusal(fake, tmp_path / "1")
    fake.files[MAIN] = {name: data for name, data in files.items() if name != SINGLE}
    message = refusal(fake, tmp_path / "2")
    assert f"holds neither {SINGLE} nor {INDEX}" in message
    assert "consolidated.safetensors" in message
    fake.files[MAIN] = {name: data for name, data in files.items() if name != "tokenizer.json"}
    assert "no tokenizer.json" in refusal(fake, tmp_path / "3")
    fake.files[MAIN] = {"adapter_config.json": b"{}", "adapter_model.safetensors": WHOLE}
    assert "is an adapter" in refusal(fake, tmp_path / "4")
    assert not {SINGLE, "adapter_model.safetensors"} & set(fake.served)


@pytest.mark.parametrize("name", ["no/model", "some/model--x", "some/mo del"])
def test_a_name_that_is_no_model(fake: FakeHub, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is neither a directory here nor a"):
        hub.download(name, endpoint=fake.url, cache_dir=tmp_path)
