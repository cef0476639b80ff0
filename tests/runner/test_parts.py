"""Parts of a model in processes of their own compute the bits of one process."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from oracle.feed import BLOCK_SIZE, Feed
from parts import THREE, model_of, parts
from small_models import GEMMA, LLAMA, Kind

from duetto.backends.backend import KVMoves
from duetto.core.errors import ConfigError, EngineError, PartLost

PROMPTS = [[5, 9, 2, 7, 1, 8, 30, 11, 4] * 5, [3, 17, 6], list(range(70))]
STAGES = [
    (Kind(THREE, "reference", "float32", None, "bfloat16"), 2),
    (Kind(GEMMA, "reference", "float32", None, "int8"), 3),
    (Kind(THREE, "cpu", "bfloat16", None, "bfloat16"), 3),
    (Kind(GEMMA, "cpu", "bfloat16", "int8", "int8"), 2),
    (Kind(LLAMA, "cpu", "float32", "int4", "float32"), 2),
    (Kind(THREE | {"tie_word_embeddings": False}, "cpu", "float32", None, "float16"), 3),
]


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.mark.parametrize(("kind", "pp"), STAGES, ids=str)
def test_stages_have_the_bits_of_one_process(kind: Kind, pp: int, tmp_path: Path) -> None:
    model_dir, model = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=pp) as backend:
        for chunk in (16, 1000):
            want = Feed(model.backend, 3, kind.kv_dtype).in_chunks(PROMPTS, chunk)
            got = Feed(backend, 3, kind.kv_dtype).in_chunks(PROMPTS, chunk)
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one, other)


def test_stages_store_move_and_give_what_one_process_does(tmp_path: Path) -> None:
    kind = Kind(GEMMA, "cpu", "float32", None, "int8")
    model_dir, model = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=3) as backend:
        feeds = [Feed(each, 3, kind.kv_dtype) for each in (model.backend, backend)]
        own, other = (feed._kv for feed in feeds)
        for feed in feeds:
            feed.in_chunks(PROMPTS, 32)
            moves = KVMoves(ints(5, 6), ints(200, 201), ints(5, 6), ints(70, 71))
            feed.backend.move_kv(moves, feed._kv)
        for layer in range(4):
            for one, two in zip(
                model.backend.read_kv(layer, ints(0, 5, 200), own),
                backend.read_kv(layer, ints(0, 5, 200), other),
                strict=True,
            ):
                np.testing.assert_array_equal(one, two)
        # A block has the bytes of one process, so either may take the other's.
        blocks, counts = [3, 0, 6], [BLOCK_SIZE, 7, BLOCK_SIZE]
        size = sum(other.block_bytes)
        one, two = (np.zeros((3, size), np.uint8) for _ in range(2))
        model.backend.export_blocks(own, blocks, one, counts)
        backend.export_blocks(other, blocks, two, counts)
        assert one.any()
        np.testing.assert_array_equal(one, two)
        backend.import_blocks(other, [9, 8, 7], one)
        backend.export_blocks(other, [9, 8, 7], two)
        np.testing.assert_array_equal(one, two)


def test_a_step_that_fails_fails_alone(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, model = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=3) as backend:
        feed = Feed(backend, 3)
        bad = feed._arrays({0: [1, 2]}, np.array([1]))
        with pytest.raises(ValueError, match="stage 0 of 3: a slot or a block outside"):
            backend.run(bad._replace(slots=ints(0, 10**6)), feed._kv)
        with pytest.raises(EngineError, match="not told by parts"):
            backend.look_deviation(bad, feed._kv)
        want = Feed(model.backend, 3).in_chunks(PROMPTS, 1000)
        for one, other in zip(feed.in_chunks(PROMPTS, 1000), want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_several_threads_may_each_have_a_step_under_way(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, model = model_of(kind, tmp_path)
    want = Feed(model.backend, 3).in_chunks(PROMPTS, 7)
    with parts(model_dir, kind, pp=3) as backend, ThreadPoolExecutor(4) as threads:
        feeds = [Feed(backend, 3) for _ in range(4)]
        for got in threads.map(lambda feed: feed.in_chunks(PROMPTS, 7), feeds):
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one, other)
        assert all(seconds > 0 for seconds in backend.host.busy_s())


def test_arenas_that_nobody_has_are_freed(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=2) as backend:
        for _ in range(300):  # more than there are places
            backend.allocate_kv(2, 8, "float32")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_that_dies_is_named_and_all_end(lost: int, tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=2) as backend:
        feed, processes = Feed(backend, 3), backend.host.process_ids
        os.kill(processes[lost], signal.SIGKILL)
        with pytest.raises(PartLost, match=rf"stage {lost} of 2 .*ended by SIGKILL"):
            feed.in_chunks(PROMPTS, 7)
        with pytest.raises(PartLost):
            backend.allocate_kv(1, 8, "float32")
        for process in processes:
            assert not is_alive(process)


def test_parts_end_with_the_backend(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=2) as backend:
        processes = backend.host.process_ids
        assert all(map(is_alive, processes))
    assert not any(map(is_alive, processes))


def test_what_a_part_cannot_load_is_told_as_one_process_tells_it(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with (
        pytest.raises(ConfigError, match=r"model.safetensors: is truncated"),
        parts(model_dir, kind, pp=2),
    ):
        pass
    with pytest.raises(ConfigError, match="--pp: 4 stages"), parts(model_dir, kind, pp=4):
        pass


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
