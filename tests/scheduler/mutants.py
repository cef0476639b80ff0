"""The scheduler with one fault planted in its source text.

A mutant is a second copy of the modules of duetto.scheduler, with some text replaced; the loaded
modules stay as they are. A fault whose text is no longer there is an error: faults may not go
stale in silence.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import duetto.scheduler.scheduler

PACKAGE = "duetto.scheduler"
ORDER = (  # importers last
    *(
        "free_blocks",
        "block_pool",
        "pins",
        "prefix",
        "latency",
        "choice",
        "reuse",
        "plan",
        "budget",
        "fairness",
        "policy",
        "misses",
        "counts",
    ),
    *("tier_prices", "ram_slots", "forgotten", "tiers", "retention", "publishing"),
    *("queues", "room", "admission"),
    *("accept", "draft_times", "drafts", "speculate", "fast_forward", "in_flight"),
    "scheduler",
)
FOLDER = Path(duetto.scheduler.scheduler.__file__).parent


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    module: str
    old: str
    new: str


def plant(fault: Fault) -> tuple[Any, Any]:
    """The classes Scheduler and BlockPool of a copy that has the fault."""
    modules = plant_in_copies(fault)
    return modules["scheduler"].Scheduler, modules["block_pool"].BlockPool


def plant_in_copies(fault: Fault) -> dict[str, ModuleType]:
    """The modules of a copy that has the fault."""
    return _load({name: _source(name, fault) for name in ORDER})


def _source(name: str, fault: Fault) -> str:
    text = (FOLDER / f"{name}.py").read_text()
    if name != fault.module:
        return text
    count = text.count(fault.old)
    assert count == 1, f"{fault.name}: its text stands {count} times in {name}.py, not once"
    return text.replace(fault.old, fault.new)


def _load(sources: dict[str, str]) -> dict[str, ModuleType]:
    """Execute the sources as the modules of the package, then put the true ones back."""
    true_modules = {name: sys.modules[f"{PACKAGE}.{name}"] for name in sources}
    copies: dict[str, ModuleType] = {}
    try:
        for name, source in sources.items():
            module = ModuleType(f"{PACKAGE}.{name}")
            sys.modules[module.__name__] = copies[name] = module
            exec(_compiled(name, source), module.__dict__)
    finally:
        for name, module in true_modules.items():
            sys.modules[f"{PACKAGE}.{name}"] = module
    return copies


@lru_cache(2 * len(ORDER))  # all modules but one are the same for every fault
def _compiled(name: str, source: str) -> CodeType:
    return compile(source, f"<planted>/{name}.py", "exec")
