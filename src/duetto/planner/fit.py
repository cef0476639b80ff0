"""Whether a layout fits into the memory of its devices, and what would change that.

Knows prices of memory; simulates nothing, and reads no weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from duetto.core.errors import ConfigError
from duetto.core.speculation import FLAG
from duetto.planner.fleet import fit_layout
from duetto.planner.layout import Layout
from duetto.pricing.cost_model import check_devices
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.memory import MemoryFit, size_in_words
from duetto.program.program import Program
from duetto.program.rewrites.shard import possible_degrees


class Capacity(NamedTuple):
    """What fits, in bytes and tokens, and what to say about it."""

    memory: MemoryFit
    longest: int  # tokens of the longest request, answer included; 0 if none fits
    notes: list[str]


class Change(NamedTuple):
    """A flag that could be changed, and what fits then."""

    words: str
    memory: MemoryFit
    length: int  # tokens of the requests that are counted

    @property
    def num_requests(self) -> int:
        """Of `length` tokens, that have room at one time."""
        return self.memory.num_requests(self.length) if self.length and self.memory.fits else 0


def fit_devices(
    program: Program, hardware: HardwareSpec, layout: Layout, draft: Program | None = None
) -> Capacity:
    """On the device with the least room, where a draft model has its part. Raises ConfigError for
    degrees that do not divide the model."""
    if draft is not None and layout.pp > 1:
        raise ConfigError(f"{FLAG} with --pp {layout.pp}: not priced; leave one of them out")
    fit = fit_layout(program, hardware, layout, draft)
    notes = [f"{layout.weights} weights; {layout.devices_per_replica} x {hardware.name}"]
    if draft is not None:
        notes.append("weights and KV are those of the model and of its draft")
    longest = min(program.max_model_len, fit.num_tokens)
    if not fit.num_blocks:
        notes.append(
            f"weights and activations alone are {size_in_words(-fit.left_bytes)} more than the "
            f"{size_in_words(fit.usable_bytes)} of each that may be used"
        )
    elif longest < program.max_model_len:
        if layout.max_model_len is not None:
            fit = replace(fit, num_blocks=0)
        notes.append(f"a request of {program.max_model_len} tokens does not fit; {longest} do")
    return Capacity(fit, longest, notes)


def fewest_devices(
    program: Program, hardware: HardwareSpec, layout: Layout, draft: Program | None = None
) -> Layout:
    """The layout on the fewest devices that have room for the longest request, or else for any
    request. If no number of them has room, the layout on all of them."""
    most = (hardware.num_devices or 1) // layout.pp if hardware.link_bandwidth else 1
    tried = [replace(layout, tp=n) for n in possible_degrees(program) if n <= most] or [layout]
    fits = [fit_devices(program, hardware, each, draft) for each in tried]
    for least in (program.max_model_len, 1):
        for each, (fit, longest, _) in zip(tried, fits, strict=True):
            if fit.fits and longest >= least:
                return each
    return tried[-1]


def device_changes(
    program: Program,
    hardware: HardwareSpec,
    layout: Layout,
    length: int | None,
    draft: Program | None = None,
) -> Iterator[Change]:
    changes: list[tuple[str, Layout]] = [
        ("--quantization int8", replace(layout, dtype="int8")),
        ("--quantization int4", replace(layout, dtype="int4")),
        ("--kv-cache-dtype int8", replace(layout, kv_cache_dtype="int8")),
        *_next_degree(program, hardware, layout, draft),
        (f"--pp {2 * layout.pp}", replace(layout, pp=2 * layout.pp)),
    ]
    fit, longest, _ = fit_devices(program, hardware, layout, draft)
    for words, changed in changes:
        try:
            other, its_longest, _ = fit_devices(program, hardware, changed, draft)
            check_devices(replace(hardware, num_devices=None), changed.deployment(program))
        except ConfigError:  # degrees that this model does not have, or devices without a link
            continue
        need, have = changed.devices_per_replica, hardware.num_devices
        if have is not None and need > have:
            if fit.fits or not other.fits:
                continue
            words += f" ({need} devices; there {'is' if have == 1 else 'are'} {have})"
        if changed != layout:
            yield Change(words, other, length or its_longest)
    if longest > 1:
        yield Change(f"requests of {longest // 2} tokens", fit, longest // 2)


def _next_degree(
    program: Program, hardware: HardwareSpec, layout: Layout, draft: Program | None
) -> list[tuple[str, Layout]]:
    """The next degree of tensor parallelism that leaves room for KV."""
    for degree in possible_degrees(program):
        wider = replace(layout, tp=degree)
        if degree > layout.tp and fit_devices(program, hardware, wider, draft).memory.fits:
            return [(f"--tp {degree}", wider)]
    return []
