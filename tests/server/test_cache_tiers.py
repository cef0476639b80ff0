"""/v1/cache over tiers: where each part of a text is, and that what is dropped is gone for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from server.fakes_server import CODEC, CONFIG, MODEL, SpeakingExecutor, running
from server.test_cache import PROMPT, ask, say
from starlette.applications import Starlette
from starlette.testclient import TestClient

from duetto.cli.cache import CacheServer, drop, lookup
from duetto.core.batch import ScheduledBatch
from duetto.core.executor import Done
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.folder import Folder
from duetto.runner.tiers.mover import Mover, TierRoom
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.tiers import Tiers, TierSizes
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

BLOCK_BYTES, NUM_SLOTS = 64, 40
TEXT = {"prompt": PROMPT}  # seven blocks of four, and three tokens more


class NoKv:
    """A backend without any; blocks are zeros."""

    def export_blocks(self, _kv: None, _blocks: Any, out: Any, _num_tokens: Any = ()) -> None:
        out[:] = 0

    def import_blocks(self, _kv: None, _blocks: Any, data: Any) -> None:
        assert not data.any()


class TieredSpeaker(SpeakingExecutor):
    """Says "ok"; its blocks come and go."""

    def __init__(self, disk: DiskTier) -> None:
        super().__init__("ok")
        self._mover = Mover(NoKv(), None, TierRoom(NUM_SLOTS, BLOCK_BYTES, disk))  # type: ignore[arg-type]

    def submit(self, batch: ScheduledBatch) -> Done:
        self._mover.move(batch)
        output = super().submit(batch).output
        return Done(output._replace(moved=self._mover.results(batch.awaits)))


def started(path: Path) -> tuple[Starlette, DiskTier]:
    disk = DiskTier(Folder(path, 1 << 20, "a model", BLOCK_BYTES))
    tiers = Tiers(TierSizes(NUM_SLOTS, True), CONFIG.block_size, disk.folder.keys)
    engine = Engine(
        Scheduler(CONFIG, tiers=tiers),
        TieredSpeaker(disk),
        decode=lambda ids, skip: CODEC.decode(ids, skip_special_tokens=skip),
    )
    settings = ServerSettings(served_model_name=MODEL, version="1.2.3")
    return create_app(
        open_engine=in_thread(engine), codec=CODEC, config=CONFIG, settings=settings
    ), disk


@contextmanager
def served(path: Path) -> Iterator[tuple[TestClient, DiskTier]]:
    """Ends with all that was under way done, as a process does."""
    app, disk = started(path)
    with TestClient(app) as client:
        yield client, disk
    assert disk.flush(20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a server has said the prompt, and has ended."""
    with served(tmp_path) as (client, _):
        assert say(client, TEXT) == 0
        (part,) = ask(client, "lookup", TEXT)["ranges"]
        assert (part["tier"], part["end"]) == ("memory", 28)
    return tmp_path


def test_a_look_up_tells_of_the_disk_apart_from_what_is_cached(path):
    with served(path) as (client, _):
        found = ask(client, "lookup", TEXT)
        assert (found["cached_tokens"], found["loadable_tokens"]) == (0, 28)
        (part,) = found["ranges"]
        assert part == {
            "start": 0, "end": 28, "tier": "disk", "exact": True, "pinned": False, "priority": None,
        }  # fmt: skip
        ask(client, "pin", TEXT)  # which brings nothing to memory
        assert ask(client, "lookup", TEXT)["ranges"] == [part]
        assert say(client, TEXT) == 28, "a request reports what it loaded"
        found = ask(client, "lookup", TEXT)
        assert (found["cached_tokens"], found["loadable_tokens"]) == (28, 0)
        (part,) = found["ranges"]
        assert (part["tier"], part["pinned"]) == ("memory", True)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_dropped_does_not_come_back_with_another_start(path, where):
    with served(path) as (client, _):
        if where == "memory":
            say(client, TEXT)
        dropped = ask(client, "drop", TEXT)
        assert dropped["tier_blocks"] == 7
        assert dropped["dropped_blocks"] == (7 if where == "memory" else 0)
        body = {"model": MODEL, "prompt": "12345678", "max_tokens": 1}
        client.post("/v1/completions", json=body)
        assert ask(client, "lookup", TEXT)["ranges"] == []
    with served(path) as (client, disk):
        assert len(disk.folder.keys) == 2  # of the other prompt
        assert ask(client, "lookup", TEXT)["ranges"] == []
        body = {"model": MODEL, "max_tokens": 1, **TEXT}
        timings = client.post("/v1/completions", json=body).json()["timings"]
        assert timings["cache_n"] == 0 and timings["cache_miss"]["reason"] == "never_seen"


def test_a_server_that_ends_at_once_has_forgotten_all_the_same(path):
    with served(path) as (client, _):
        ask(client, "drop", TEXT)
    assert not [*path.iterdir()]


def test_why_it_misses_what_only_the_disk_had_is_told(path):
    with served(path) as (client, _):
        ask(client, "drop", TEXT)
        body = {"model": MODEL, "max_tokens": 1, **TEXT}
        timings = client.post("/v1/completions", json=body).json()["timings"]
        assert timings["cache_miss"]["reason"] == "dropped"


def test_the_command_says_the_same(path, capsys):
    app, _ = started(path)
    with running(app) as url:
        server = CacheServer(url=url)
        lookup(PROMPT, server=server)
        first, second = capsys.readouterr().out.strip().split("\n")
        assert first == "0 of 31 tokens need not be computed; 28 more can be loaded"
        assert second == "  0 ... 27: exact, on the disk"
        drop(PROMPT, server=server)
        assert capsys.readouterr().out.strip() == "0 blocks dropped; 7 in RAM or on the disk"
