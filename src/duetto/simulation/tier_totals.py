"""What tiers did in a simulation: blocks, where tokens of prompts were found, seconds of moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from duetto.measure.metrics import JsonValue
from duetto.scheduler.tiers import TierCounts
from duetto.simulation.tiers import MoveCounts


class DiskUse(NamedTuple):
    """Of one disk."""

    read_s: float
    write_s: float
    num_dropped: int  # blocks


class TierUse(NamedTuple):
    """Of one replica."""

    counts: TierCounts  # as the scheduler has them
    moves: MoveCounts
    block_size: int
    disk: DiskUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTotals:
    """Of all replicas together."""

    num_prompt_tokens: int
    hits: dict[str, int]  # of them, tokens by the tier that had them
    ram: dict[str, int]  # blocks by what became of them
    disk: dict[str, int]
    copy_s: float  # inside steps
    disk_read_s: float  # behind steps
    disk_write_s: float
    exposed_s: float  # of the two, while no step was computed
    waited_s: float  # for the disk, with nothing to compute

    @property
    def hit_rates(self) -> dict[str, float]:
        return {tier: hits / max(1, self.num_prompt_tokens) for tier, hits in self.hits.items()}

    @property
    def hidden(self) -> float:
        """Of the disk's time, the part in which steps were computed."""
        disk_s = self.disk_read_s + self.disk_write_s
        return max(0.0, 1 - self.exposed_s / disk_s) if disk_s else 0.0

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "hit_rates": dict(self.hit_rates),
            "ram_blocks": dict(self.ram),
            "disk_blocks": dict(self.disk),
            "copy_s": self.copy_s,
            "disk_read_s": self.disk_read_s,
            "disk_write_s": self.disk_write_s,
            "disk_hidden": self.hidden,
            "waited_s": self.waited_s,
        }

    @property
    def words(self) -> tuple[str, ...]:
        """A few lines for people."""
        rates = ", ".join(f"{tier} {rate:.1%}" for tier, rate in self.hit_rates.items())
        disk_s = self.disk_read_s + self.disk_write_s
        lines = [f"tokens of prompts found, by tier: {rates}", f"RAM: {_blocks(self.ram)}"]
        if self.disk:
            lines.append(f"disk: {_blocks(self.disk)}")
        moves = f"moves: {self.copy_s:.2f} s of copies inside steps"
        if self.disk:
            moves += (
                f"; {disk_s:.2f} s of the disk, {self.hidden:.0%} of it while steps were computed; "
                f"{self.waited_s:.2f} s waited for it with nothing to compute"
            )
        return (*lines, moves)


def _blocks(counts: dict[str, int]) -> str:
    told = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    return f"{told} (blocks)"


def total_tiers(
    uses: Sequence[TierUse], num_prompt_tokens: int, num_cached_tokens: int
) -> TierTotals | None:
    """None without tiers. The tokens are those of all requests that were served."""
    if not uses:
        return None
    disks = [use.disk for use in uses if use.disk is not None]
    ram_hits = sum(use.moves.num_ram_hits * use.block_size for use in uses)
    disk_hits = sum(use.moves.num_disk_hits * use.block_size for use in uses)
    hits = {"arena": num_cached_tokens - ram_hits - disk_hits, "ram": ram_hits}
    ram = {
        "stored": sum(use.counts.num_kept for use in uses),
        "loaded": sum(use.counts.num_loaded for use in uses),
        "declined": sum(use.counts.num_ram_declined for use in uses),
        "dropped": sum(use.moves.num_dropped for use in uses),
    }
    disk: dict[str, int] = {}
    if disks:
        hits["disk"] = disk_hits
        refused = sum(use.moves.num_refused for use in uses)
        disk = {
            "stored": sum(use.counts.num_written for use in uses),
            "loaded": sum(use.counts.num_read for use in uses),
            "declined": sum(use.counts.num_declined for use in uses),
            "dropped": sum(disk.num_dropped for disk in disks),
            "refused": refused,
            "gone": sum(use.counts.num_failed for use in uses) - refused,
        }
    return TierTotals(
        num_prompt_tokens=num_prompt_tokens,
        hits=hits,
        ram=ram,
        disk=disk,
        copy_s=sum(use.moves.copy_s for use in uses),
        disk_read_s=sum(disk.read_s for disk in disks),
        disk_write_s=sum(disk.write_s for disk in disks),
        exposed_s=sum(use.moves.exposed_s for use in uses),
        waited_s=sum(use.moves.waited_s for use in uses),
    )
