"""Parts of a model in processes of their own compute the bits of one process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from native import cpu_ranks
from oracle.feed import BLOCK_SIZE, Feed
from parts import THREE, model_of, parts
from small_models import GEMMA, LLAMA, Kind, Model

from duetto import LLM, SamplingParams
from duetto.backends.backend import KVMoves
from duetto.backends.parts.backend import PartsBackend
from duetto.backends.reference.ranks import ReferenceRanks
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError, EngineError, PartLost
from duetto.models.programs import load_program
from duetto.program.rewrites.shard import shard
from duetto.runner.parts_loader import shared_out, threads_of_part

PROMPTS = [[5, 9, 2, 7, 1, 8, 30, 11, 4] * 5, [3, 17, 6], list(range(70))]
SLOW = pytest.mark.oracle  # with all of them the fast tests would not be
STAGES = [
    pytest.param(Kind(THREE, "reference", "float32", None, "bfloat16"), 2, marks=SLOW),
    pytest.param(Kind(GEMMA, "reference", "float32", None, "int8"), 3, marks=SLOW),
    (Kind(THREE, "cpu", "bfloat16", None, "bfloat16"), 3),
    (Kind(GEMMA, "cpu", "bfloat16", "int8", "int8"), 2),
    pytest.param(Kind(LLAMA, "cpu", "float32", "int4", "float32"), 2, marks=SLOW),
    pytest.param(
        Kind(THREE | {"tie_word_embeddings": False}, "cpu", "float32", None, "float16"),
        3,
        marks=SLOW,
    ),
]


RANKS = [
    pytest.param(Kind(THREE, "reference", "float32", None, "bfloat16"), 2, 1, marks=SLOW),
    pytest.param(Kind(LLAMA, "reference", "float32", None, "float32"), 4, 1, marks=SLOW),
    (Kind(THREE, "reference", "float32", None, "int8"), 2, 2),
    (Kind(GEMMA, "cpu", "float32", None, "int8"), 2, 1),
    pytest.param(Kind(LLAMA, "cpu", "bfloat16", "int8", "bfloat16"), 2, 1, marks=SLOW),
    pytest.param(Kind(LLAMA, "cpu", "float32", None, "float32"), 4, 1, marks=SLOW),
    pytest.param(Kind(THREE, "cpu", "bfloat16", None, "bfloat16"), 2, 2, marks=SLOW),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, PartsBackend]]:
    """A model in three stages, and its twin, for tests that leave them as they were."""
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, model = model_of(kind, tmp_path_factory.mktemp("three"))
    with parts(model_dir, kind, pp=3) as backend:
        yield model, backend


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


@pytest.mark.parametrize(("kind", "tp", "pp"), RANKS, ids=str)
def test_ranks_have_the_bits_of_their_twin(kind: Kind, tp: int, pp: int, tmp_path: Path) -> None:
    model_dir, _ = model_of(kind, tmp_path)
    _, whole = load_program(model_dir)
    weights = load_weights(model_dir, whole, kind.dtype)
    if kind.backend == "reference":
        twin = ReferenceRanks([shard(whole, tp, rank) for rank in range(tp)], weights)
    else:
        twin = cpu_ranks(whole, weights, tp, kind.quantization)
    with parts(model_dir, kind, tp=tp, pp=pp) as backend:
        for chunk in (16, 1000):
            want = Feed(twin, 3, kind.kv_dtype).in_chunks(PROMPTS, chunk)
            got = Feed(backend, 3, kind.kv_dtype).in_chunks(PROMPTS, chunk)
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one, other)


def test_all_ranks_have_their_heads(tmp_path: Path) -> None:
    """Where ranks are more than heads of keys, a head is told once."""
    kind = Kind(LLAMA, "cpu", "float32", None, "float32")
    model_dir, model = model_of(kind, tmp_path)
    with parts(model_dir, kind, tp=4) as backend:
        processes = backend.host.process_ids
        assert all(map(is_alive, processes))
        feeds = [Feed(each, 3) for each in (model.backend, backend)]
        for feed in feeds:
            feed.in_chunks(PROMPTS, 32)
        for layer in range(2):
            own, theirs = (f.backend.read_kv(layer, ints(3, 0, 40), f._kv) for f in feeds)
            for one, other in zip(own, theirs, strict=True):
                assert one.shape == other.shape
                np.testing.assert_allclose(one, other, atol=1e-4)  # between degrees, bits differ
    assert not any(map(is_alive, processes))  # they end with the backend


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    kind = Kind(LLAMA, "cpu", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    with parts(model_dir, kind, tp=2) as backend:
        feed, processes = Feed(backend, 3), backend.host.process_ids
        os.kill(processes[1], signal.SIGKILL)
        with pytest.raises(PartLost, match=r"rank 1 of 2 .*ended by SIGKILL"):
            feed.in_chunks(PROMPTS, 7)
        assert not any(map(is_alive, processes))


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


def test_a_step_that_fails_fails_alone(three: tuple[Model, PartsBackend]) -> None:
    model, backend = three
    feed = Feed(backend, 3)
    bad = feed._arrays({0: [1, 2]}, np.array([1]))
    with pytest.raises(ValueError, match="stage 0 of 3: a slot or a block outside"):
        backend.run(bad._replace(slots=ints(0, 10**6)), feed._kv)
    with pytest.raises(EngineError, match="not told by parts"):
        backend.look_deviation(bad, feed._kv)
    want = Feed(model.backend, 3).in_chunks(PROMPTS, 1000)
    for one, other in zip(feed.in_chunks(PROMPTS, 1000), want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_several_threads_may_each_have_a_step_under_way(
    three: tuple[Model, PartsBackend],
) -> None:
    model, backend = three
    want = Feed(model.backend, 3).in_chunks(PROMPTS, 7)
    with ThreadPoolExecutor(4) as threads:
        feeds = [Feed(backend, 3) for _ in range(4)]
        for got in threads.map(lambda feed: feed.in_chunks(PROMPTS, 7), feeds):
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one, other)
    assert all(seconds > 0 for seconds in backend.host.busy_s())


def test_arenas_that_nobody_has_are_freed(three: tuple[Model, PartsBackend]) -> None:
    for _ in range(300):  # more than there are places
        three[1].allocate_kv(2, 8, "float32")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=SLOW)])
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


def test_a_part_that_hangs_is_named(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    with parts(model_dir, kind, pp=2) as backend:
        feed, processes = Feed(backend, 3), backend.host.process_ids
        backend.host.hang_s = 1.0
        os.kill(processes[1], signal.SIGSTOP)
        with pytest.raises(PartLost, match=r"stage 1 of 2 .*nothing for 1 s, and hangs"):
            feed.in_chunks(PROMPTS, 7)
        assert not any(map(is_alive, processes))


def test_parts_end_when_the_engine_is_killed(tmp_path: Path) -> None:
    kind = Kind(THREE, "reference", "float32", None, "float32")
    model_dir, _ = model_of(kind, tmp_path)
    code = (
        "import sys, time; sys.path[:] = sys.argv[2:]\n"
        "from pathlib import Path; from parts import parts; from small_models import LLAMA, Kind\n"
        "kind = Kind(LLAMA, 'reference', 'float32', None, 'float32')\n"
        "with parts(Path(sys.argv[1]), kind, pp=2) as backend:\n"
        "    print(*backend.host.process_ids, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(model_dir), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        processes = [int(word) for word in engine.stdout.readline().split()]
        assert len(processes) == 2
        assert all(map(is_alive, processes))
        engine.kill()
    until = monotonic() + 30
    while any(map(is_alive, processes)):
        assert monotonic() < until, "parts outlive their engine"
        sleep(0.02)


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
    words = "--tp: 3 does not divide the model's heads; the nearest that do: 2, 4"
    with pytest.raises(ConfigError, match=words), parts(model_dir, kind, tp=3):
        pass


@SLOW
def test_answers_of_stages_are_those_of_one_process() -> None:
    prompts = ["Anna has the red key.", "One two three", "a b c d " * 20, "Hello", "x"]
    sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=2, ignore_eos=True)
    answers = []
    for pp in (1, 2):
        with LLM("duetto-demo", backend="cpu", pipeline_parallel_size=pp, max_num_seqs=4) as llm:
            answers.append([a.outputs[0] for a in llm.generate(prompts, sampling)])
            llm.reset_prefix_cache()
            answers.append([a.outputs[0] for a in llm.generate(prompts[::-1], sampling)][::-1])
    told = [[(a.token_ids, a.logprobs) for a in own] for own in answers]
    assert told[0] == told[2]  # with the same numbers, so the same seeds
    assert [len(ids) for ids, _ in told[3]] == [12] * 5
    with pytest.raises(EngineError, match="closed"):
        llm.generate("Hello")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 0}, "--pipeline-parallel-size: must be 1 or more"),
        ({"tensor_parallel_size": 1.5}, "--tensor-parallel-size: must be 1 or more"),
        (
            {"pipeline_parallel_size": 2, "speculative_config": {"method": "ngram"}},
            "--pp and --speculative-config: ",
        ),
        ({"pipeline_parallel_size": 2, "kv_offloading_size": 1}, "--pp and --kv-offloading-size: "),
        ({"tensor_parallel_size": 2, "speculative_model": "x"}, "--tp and a draft model: "),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineArgs(**options)


def test_cores_are_shared_out() -> None:
    assert shared_out(range(5), 2) == [(0, 1), (2, 3, 4)]
    assert shared_out([3], 2) == [(3,), (3,)]
    assert [threads_of_part(7, 2, 3), threads_of_part(1, 4, 2)] == [2, 1]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # whose parent, of a process that was killed, has not yet asked for it
