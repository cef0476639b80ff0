"""KV tiers in virtual time: what is found there, what it takes, and that bounds are kept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from simulation.loads import mixed_load, scheduler_config, step_time
from simulation.test_fast_forward import everything

from duetto.core.batch import BlockMove
from duetto.core.config import SchedulerConfig
from duetto.core.offloading import max_queued_bytes
from duetto.core.shape import BatchShape
from duetto.runner.tiers.block_file import file_bytes
from duetto.runner.tiers.folder import Folder
from duetto.simulation.disk import DiskSpec, SimulatedFiles, VirtualDisk
from duetto.simulation.replica import Replica, ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, Simulation, simulate
from duetto.simulation.tier_totals import TierTotals
from duetto.simulation.tiers import TierSpec
from duetto.simulation.workload import Arrival, Traffic

BLOCK = 1000  # bytes
FAST = 1e15  # bytes/s
SIZE = 8  # tokens of a block
TENANTS = (b"d", b"d", b"e")  # in the order of the digests that a folder has for them


def disk(max_blocks: int = 10**6, read: float = FAST, write: float = FAST) -> DiskSpec:
    return DiskSpec(max_bytes=max_blocks * BLOCK, read_bytes_per_s=read, write_bytes_per_s=write)


def tiers(num_ram: int = 10**5, disk: DiskSpec | None = None, copy: float = FAST) -> TierSpec:
    return TierSpec(num_ram_blocks=num_ram, block_bytes=BLOCK, copy_bytes_per_s=copy, disk=disk)


def config(num_blocks: int = 20) -> SchedulerConfig:
    return scheduler_config(num_blocks=num_blocks, max_model_len=1000)


def by_token(shape: BatchShape) -> float:
    return float(shape.num_tokens)


def run(
    traffic: Traffic,
    spec: TierSpec | None,
    *,
    num_blocks: int = 20,
    fast: bool = True,
    num_replicas: int = 1,
) -> Simulation:
    replica = ReplicaSpec(scheduler=config(num_blocks), step_time=by_token, tiers=spec)
    return simulate(traffic, Fleet(replica=replica, num_replicas=num_replicas), fast=fast)


def load(*prompts: tuple[int, ...], apart_s: float = 1e4) -> Traffic:
    """One request after the other, of texts of two blocks and a question."""
    arrivals = [
        Arrival(n * apart_s, 2 * SIZE * len(ids) + 3, 2, ids) for n, ids in enumerate(prompts)
    ]
    return Traffic(tuple(arrivals), 2 * SIZE)


def conversations(seed: int, count: int) -> Traffic:
    """Some that go on, in any order; each turn has what was said before and a text more."""
    rng = Random(seed)
    said: list[tuple[int, ...]] = [(n,) for n in range(8)]
    turns = []
    for number in range(count):
        which = rng.randrange(len(said))
        said[which] = (*said[which], 100 + number) if len(said[which]) < 7 else (1000 + number,)
        turns.append(said[which])
    return load(*turns)


def cached(simulation: Simulation) -> list[int]:
    return [served.num_cached_tokens for served in simulation.served]


def totals(simulation: Simulation) -> TierTotals:
    found = sum_up(simulation, 1).tiers
    assert found is not None
    return found


@pytest.mark.parametrize(
    "spec", [tiers(), tiers(60, disk()), tiers(60, disk(write=1e5))], ids=["ram", "disk", "slow"]
)
@pytest.mark.parametrize("seed", range(3))
def test_tiers_without_end_find_what_an_arena_without_end_would(spec: TierSpec, seed: int) -> None:
    traffic = conversations(seed, 60)
    there, lost = run(traffic, None, num_blocks=10**4), run(traffic, None)
    assert sum(cached(lost)) < sum(cached(there)) / 2
    found = run(traffic, spec)
    assert cached(found) == cached(there)
    rates = totals(found).hit_rates
    prompts = sum(served.num_prompt_tokens for served in found.served)
    assert sum(rates.values()) == pytest.approx(sum(cached(there)) / prompts)
    assert rates["ram"] > 0 and ("disk" in rates) == (spec.disk is not None)
    assert rates.get("disk", 1) > 0


def test_what_a_copy_takes() -> None:
    """Four blocks are evicted for four others, and come back; the question is computed."""
    simulation = run(load((1, 2), (3, 4), (1, 2)), tiers(copy=BLOCK * 10), num_blocks=5)
    first, second, third = [served.timings.ttft_s for served in simulation.served]
    assert first == 35
    assert second == pytest.approx(35 + 4 * 0.1)
    assert third == pytest.approx(3 + 4 * 0.1 + 4 * 0.1)
    found = totals(simulation)
    assert found.ram == {"stored": 8, "loaded": 4, "declined": 0, "dropped": 0}
    assert found.hits == {"arena": 0, "ram": 32} and not found.disk
    assert found.copy_s == pytest.approx(1.2)


def test_what_the_disk_takes() -> None:
    """Four blocks have left RAM too, when they are asked for again: four others, and those of two
    texts between, were more than it has."""
    slow = disk(read=BLOCK / 0.3, write=BLOCK)
    texts = ((1, 2), (3, 4), (5, 6), (7, 8), (1, 2))
    simulation = run(load(*texts), tiers(8, slow), num_blocks=5)
    assert [served.timings.ttft_s for served in simulation.served] == pytest.approx(
        [35, 35, 35, 35, 4 * 0.3 + 3]
    )
    found = totals(simulation)
    assert found.hits == {"arena": 0, "ram": 0, "disk": 32}
    assert found.disk["stored"] == 16 and found.disk["loaded"] == 4
    assert (found.disk_read_s, found.waited_s) == pytest.approx((1.2, 1.2))
    assert found.disk_write_s == pytest.approx(16)
    # Each text is written behind the step of the answer's second token, which takes a second.
    assert found.exposed_s == pytest.approx(1.2 + 4 * 3)
    assert found.hidden == pytest.approx(4 / 17.2)


def test_the_disk_is_read_behind_the_steps_of_others() -> None:
    """A long answer streams while the next request's texts are read."""
    texts = [Arrival(1e4 * n, 35, 2, (n, n + 10)) for n in range(6)]
    others = [Arrival(1e5, 5, 40, ()), Arrival(1e5 + 10, 35, 2, (0, 10))]
    traffic = Traffic((*texts, *others), 2 * SIZE)
    found = run(traffic, tiers(8, disk(read=BLOCK / 0.4)), num_blocks=12)
    assert totals(found).disk["loaded"] == 4 and totals(found).waited_s == 0
    assert totals(found).hits["disk"] == 32 and totals(found).hidden > 0.99
    ttft_s = found.served[-1].timings.ttft_s
    assert ttft_s == pytest.approx(2 + 3 + 1)  # two steps, and its own beside the stream's


def differing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def test_what_is_slower_than_computing_is_not_loaded() -> None:
    """But for the first time, and one in sixteen."""
    traffic = conversations(1, 150)
    plain = run(traffic, None)
    from_ram = run(traffic, tiers(copy=BLOCK / 50))
    from_disk = run(traffic, tiers(4, disk(read=BLOCK / 50)))
    most_tries = 1 + 150 // 16
    assert totals(from_ram).ram["declined"] > 100
    assert 0 < differing(cached(from_ram), cached(plain)) <= most_tries
    assert totals(from_disk).disk["declined"] > 100
    assert 0 < totals(from_disk).disk["loaded"] <= 2 * most_tries  # of four slots it holds two


@pytest.mark.parametrize("spec", [tiers(6), tiers(9, disk(12, 3e5, 1e5), 1e6)], ids=["ram", "disk"])
def test_bounds_are_kept(spec: TierSpec) -> None:
    ends: list[str] = []
    replica = Replica(
        ReplicaSpec(scheduler=scheduler_config(num_blocks=70), step_time=step_time, tiers=spec),
        on_end=lambda update: ends.append(update.request_id),
    )
    traffic = mixed_load(5, num_requests=50)
    for index, arrival in enumerate(traffic.arrivals):
        replica.offer(traffic.request(index), arrival.arrival_s)
        replica._scheduler.check()
        assert replica._moving is not None
        assert len(replica._moving._filled) <= spec.num_ram_blocks
        if spec.disk is not None:
            assert replica._moving.disk is not None
            assert replica._moving.disk.num_bytes <= spec.disk.max_bytes
    replica.run_until(float("inf"))
    use = replica.tier_use
    assert len(ends) == 50 and use is not None
    assert use.moves.num_dropped > 0 and use.counts.num_loaded > 0
    assert use.disk is None or use.disk.num_dropped > 0


@pytest.mark.parametrize("mean_gap_s", [0.02, 0.4])
@pytest.mark.parametrize(
    "spec", [tiers(9), tiers(30, disk(60, 3e5, 1e5), 1e6)], ids=["ram", "disk"]
)
def test_many_steps_at_once_change_no_number(spec: TierSpec, mean_gap_s: float) -> None:
    for seed in range(3):
        traffic = mixed_load(seed, mean_gap_s=mean_gap_s, num_requests=40)
        replica = ReplicaSpec(
            scheduler=scheduler_config(num_blocks=70), step_time=step_time, tiers=spec
        )
        runs = [
            simulate(traffic, Fleet(replica=replica), fast=fast) for fast in (True, False, True)
        ]
        fast, slow, again = runs
        assert everything(fast) == everything(slow) == everything(again)
        assert fast.tiers == slow.tiers == again.tiers


def test_some_steps_are_run_at_once() -> None:
    """Between the blocks that they take and fill."""
    lengths: list[int] = []
    replica = Replica(
        ReplicaSpec(scheduler=config(), step_time=by_token, tiers=tiers(disk=disk())),
        on_end=lambda _update: None,
    )
    take_over = replica.take_over

    def watched(start: float, ends: Sequence[float]) -> None:
        lengths.append(len(ends))
        take_over(start, ends)

    replica.take_over = watched  # type: ignore[method-assign]
    traffic = Traffic((Arrival(0.0, 5, 60, ()),), 2 * SIZE)
    replica.offer(traffic.request(0), 0.0)
    replica.run_until(float("inf"))
    assert lengths and max(lengths) == SIZE - 2  # in the others one is full, and one is taken


def test_replicas_are_counted_together() -> None:
    traffic = conversations(2, 40)
    found = totals(run(traffic, tiers(30, disk()), num_replicas=2))
    assert found.num_prompt_tokens == sum(a.num_prompt_tokens for a in traffic.arrivals)
    assert found.disk["stored"] > 0 and sum(found.hits.values()) > 0
    words = "\n".join(found.words)
    assert "by tier: arena" in words and "stored" in words and "while steps were computed" in words
    assert totals(run(traffic, tiers())).words[-1].endswith("s of copies inside steps")


# --- the disk --------------------------------------------------------------------------------


def move(number: int, *keys: int, to_disk: bool = True, tenant: bytes = b"") -> BlockMove:
    places = tuple(range(len(keys)))
    names = tuple([key.to_bytes(32, "little") for key in keys])
    if to_disk:
        return BlockMove(number, "arena", "disk", names, places, (), tenant)
    return BlockMove(number, "disk", "ram", names, (), places, tenant)


def test_reads_go_first_and_one_by_one() -> None:
    one = VirtualDisk(disk(read=BLOCK, write=BLOCK / 2), BLOCK)
    one.add(move(0, 1, 2), 10.0)  # until 14
    one.add(move(1, 3), 11.0)  # from 15, behind the read
    one.add(move(2, 1, to_disk=False), 12.0)  # from 14 to 15
    assert one.wait((1, 2), 12.0, 60.0) == 15.0
    assert [result.move_id for result in one.take_results()] == [0, 2]
    assert one.busy_s(15.0) == 5.0
    assert one.wait((1,), 15.0, 0.5) == 15.5 and one.busy_s(15.5) == 5.5
    assert one.wait((7,), 15.5, 60.0) == 15.5  # not known: nothing to wait for
    one.run(100.0)
    (last,) = one.take_results()
    assert (last.move_id, last.num_done, last.seconds) == (1, 1, 2.0)
    assert (one.read_s, one.write_s) == (1.0, 6.0)
    one.add(move(3, 4, 1, to_disk=False), 200.0)  # it has no 4
    assert one.take_results()[0][:4] == (3, 0, 0.0, "it is not there")


def test_what_is_to_be_written_is_bounded() -> None:
    block_bytes = 16 << 20
    assert max_queued_bytes(block_bytes) == 16 * block_bytes
    one = VirtualDisk(replace(disk(), write_bytes_per_s=1.0), block_bytes)
    assert one.has_room_for(100)  # nothing else waits
    one.add(move(0, 1, 2), 0.0)
    assert one.has_room_for(14) and not one.has_room_for(15)
    one.add(move(1, 3, to_disk=False), 0.0)
    assert one.has_room_for(14)


def test_files_fall_out_as_a_folders_do(tmp_path: Path) -> None:
    """The double of runner/tiers/folder.py: what is read, what is written, and what is dropped."""
    rng, size, length = Random(3), 64, 2
    real = Folder(tmp_path, int(4.5 * file_bytes(length, size)), "kv", size)
    double = SimulatedFiles(int(4.5 * length * size), size)
    num_dropped = 0
    for number in range(120):
        first = rng.randrange(12)
        each = move(
            number, first, first + 1, to_disk=rng.random() < 0.5, tenant=rng.choice(TENANTS)
        )
        if each.target == "disk":
            blocks = np.zeros((length, size), np.uint8)
            assert real.write(each.keys, blocks, each.tenant) is None
            assert double.write(each) == (length, None)
        else:
            rows = np.zeros((length, size), np.uint8)
            num_done, _ = real.read(each.keys, [*rows])
            assert double.read(each)[0] == num_done
        dropped = real.take_dropped()
        assert double.take_dropped() == dropped
        num_dropped += len(dropped)
    assert num_dropped > 20 and double.num_dropped >= num_dropped
