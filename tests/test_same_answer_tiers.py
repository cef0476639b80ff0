"""The same answer bit for bit with KV tiers and without: cold, warm, evicted, restarted.

The arena is too small for what is asked, so most of what comes again comes from RAM or the disk."""

from pathlib import Path

import numpy as np
import pytest
from fakes import make_request
from small_models import KINDS, VOCAB, Model, make_model
from test_same_answer import answers
from test_same_answer_reuse import requests as reusing_requests

from duetto.core.request import Request
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.folder import Folder

ARENA = 40  # blocks; five of the longest requests take them all


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def requests(name: str = "p") -> list[Request]:
    """Two of each prompt, one behind the other, and some that only begin alike."""
    rng, made = np.random.default_rng(3), list[Request]()
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (70, 33, 90, 64, 8, 100)]
    for index, prompt in enumerate([*prompts, *prompts, prompts[5][:50] + prompts[0]]):
        options = {"temperature": (0, 1.0)[index % 2], "seed": index, "logprobs": 2}
        made.append(make_request(f"{name}{index}", prompt, 10, **options))
    return made


@pytest.fixture(scope="module")
def alone(model) -> dict[str, list]:
    found = {}
    for request in (*requests(), *reusing_requests()):
        found |= answers(
            model.engine(at_once=True), [named(request, f"alone-{request.request_id}")]
        )
    return {name.removeprefix("alone-"): answer for name, answer in found.items()}


def named(request: Request, name: str) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        seed=request.seed,
        reuse=request.reuse,
    )


def test_blocks_leave_an_arena_and_come_into_another(model):
    """Bytes for bytes, in another order, with nothing beside them touched."""
    kv, other = (model.backend.allocate_kv(6, 8, model.kv_dtype) for _ in range(2))
    rng = np.random.default_rng(0)
    written = rng.integers(0, 256, (6, model.block_bytes), np.uint8)
    model.backend.import_blocks(kv, range(6), written)
    out = np.empty((3, model.block_bytes), np.uint8)
    model.backend.export_blocks(kv, (4, 0, 2), out)
    assert np.array_equal(out, written[[4, 0, 2]])
    model.backend.import_blocks(other, (1, 3, 5), out)
    whole = np.empty((6, model.block_bytes), np.uint8)
    model.backend.export_blocks(other, range(6), whole)
    assert np.array_equal(whole[[1, 3, 5]], out)
    assert not whole[[0, 2, 4]].any()


@pytest.mark.parametrize("count", [1, 5, 7])
def test_of_a_block_that_is_not_full_only_its_tokens_leave(model, count):
    """Bit for bit; zeros are in the place of what lies behind them, whatever the layout."""
    kv, other = (model.backend.allocate_kv(6, 8, model.kv_dtype) for _ in range(2))
    rng = np.random.default_rng(1)
    model.backend.import_blocks(kv, range(6), rng.integers(1, 120, (6, model.block_bytes), "u1"))
    whole, first = (np.full((2, model.block_bytes), 255, np.uint8) for _ in range(2))
    model.backend.export_blocks(kv, (4, 2), whole)
    model.backend.export_blocks(kv, (4, 2), first, (count, 8))
    assert np.array_equal(first[1], whole[1])
    assert np.count_nonzero(first[0]) <= model.block_bytes * count // 8
    model.backend.import_blocks(other, (1,), first[:1])
    slots = np.arange(8, dtype=np.int32)
    for layer in range(len(model.program.kv)):
        there = model.backend.read_kv(layer, 32 + slots, kv)
        for old, new in zip(there, model.backend.read_kv(layer, 8 + slots, other), strict=True):
            assert new[:count].tobytes() == old[:count].tobytes()
            assert not new[count:].any()


@pytest.mark.parametrize("blocks", [(-1,), (6,), (0, 0)])
def test_blocks_outside_the_arena_or_twice_are_refused(model, blocks):
    kv = model.backend.allocate_kv(6, 8, model.kv_dtype)
    with pytest.raises(AssertionError, match=r"outside|twice"):
        model.backend.import_blocks(kv, blocks, np.zeros((len(blocks), model.block_bytes), "u1"))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_slots", [4, 30, 200])
def test_evicted_to_ram(model, alone, num_slots, depth):
    engine = model.engine(num_blocks=ARENA, tiers=model.room(num_slots), depth=depth)
    for together in (1, 2):
        found = answers(engine, requests(), together=together)
        assert found == {name: alone[name] for name in found}
    if num_slots > 4:
        assert engine.scheduler.tiers.counts.num_loaded > 10


def test_texts_evicted_to_ram(model, alone):
    engine = model.engine(num_blocks=ARENA, tiers=model.room(60))
    for _ in range(2):
        found = answers(engine, reusing_requests(), together=2)
        assert found == {name: alone[name] for name in found}
    assert engine.scheduler.tiers.counts.num_loaded > 10


def test_restarted_with_a_disk(model, alone, tmp_path):
    cold = model.engine(num_blocks=ARENA, tiers=room(model, tmp_path))
    wanted = [*requests(), *reusing_requests()]
    for request in wanted:
        request.request_id = f"cold-{request.request_id}"
    answers(cold, wanted, together=2)
    cold_room = cold._computer._executor._parts.mover._disk
    assert cold_room.flush(20)
    disk = room(model, tmp_path)
    assert disk.disk.folder.keys
    warm = model.engine(num_blocks=ARENA, tiers=disk)
    found = answers(warm, [*requests(), *reusing_requests()[3:]], together=2)
    renamed = {name: alone[name] for name in found}
    assert found == renamed
    assert warm.scheduler.tiers.counts.num_read > 10


def room(model: Model, path: Path):
    folder = Folder(path / "kv", 1 << 24, "this model", model.block_bytes)
    return model.room(80, DiskTier(folder))
