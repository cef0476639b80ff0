"""What `--speculative-config` and `--speculative-acceptance` mean for what is simulated.

A simulation has no text, so how often drafts are right must be said: as a number, by place in a
chain, or by a run that was recorded. Knows prices and memory; simulates nothing.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from duetto.core.errors import ConfigError
from duetto.core.speculation import FLAG, MODEL_FLAG, Method, MethodOptions, SpeculativeConfig
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.memory import MemoryFit
from duetto.program.program import Program
from duetto.simulation.speculation import SimulatedDrafts

ACCEPTANCE_FLAG = "--speculative-acceptance"
RARE = 50  # a place that fewer than one in so many chains have
_ACCEPTED = "0.8, or 0.8,0.65,0.5 by place in a chain, or the JSON of a run that had drafts"


class SpeculationOptions(Protocol):
    @property
    def speculative_config(self) -> str | None: ...
    @property
    def speculative_model(self) -> str | None: ...
    @property
    def speculative_acceptance(self) -> str | None: ...
    @property
    def pp(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model, as it is laid over the devices of the target."""

    program: Program
    deployment: Deployment


def proposer(options: SpeculationOptions) -> tuple[Method, MethodOptions] | None:
    """The one method that proposes, and its options; None without speculation. Raises ConfigError
    for flags that do not go together."""
    config = SpeculativeConfig.parse(options.speculative_config, options.speculative_model)
    if config is None:
        if options.speculative_acceptance is not None:
            raise ConfigError(f"{ACCEPTANCE_FLAG}: needs {FLAG} or {MODEL_FLAG}")
        return None
    if options.speculative_acceptance is None:
        raise ConfigError(
            f"{FLAG}: a simulation has no text, so it needs {ACCEPTANCE_FLAG}: {_ACCEPTED}"
        )
    if len(config.methods) > 1:
        raise ConfigError(
            f"{FLAG}: {' and '.join(config.methods)} together are not simulated; give one method"
        )
    if options.pp > 1:
        raise ConfigError(f"{FLAG} with --pp {options.pp}: not simulated; leave one of them out")
    return next(iter(config.methods.items()))


def read_acceptance(text: str) -> tuple[float, ...]:
    """How often the first, second, … draft of a chain is right if those before it are.

    `text` gives, as vLLM's per-position acceptance rates do, the part of chains in which it is
    accepted; one number is for every place, given those before. Raises ConfigError.
    """
    if text.endswith(".json"):
        return _conditional(_recorded(Path(text)), text)
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{ACCEPTANCE_FLAG} {text!r:.80}: must be {_ACCEPTED}") from None
    return _conditional(rates, text[:80])


def _conditional(rates: list[float], text: str) -> tuple[float, ...]:
    if not rates or not all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates):
        raise ConfigError(f"{ACCEPTANCE_FLAG} {text}: each must be from 0 to 1")
    if any(later > earlier + 1e-9 for earlier, later in pairwise(rates)):
        raise ConfigError(
            f"{ACCEPTANCE_FLAG} {text}: no draft is accepted without those before it, so the "
            f"numbers must not rise"
        )
    given = [b / a if a > 0 else 0.0 for a, b in pairwise(rates)]
    return (rates[0], *[min(1.0, each) for each in given])


def _recorded(file: Path) -> list[float]:
    """The acceptance by place of a run: of `bench serve --json` or `--save-result`, of a reply's
    `timings`, or of a simulation, wherever in the document it stands first."""
    try:
        document = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{ACCEPTANCE_FLAG} {file}: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{ACCEPTANCE_FLAG} {file}: is not JSON ({error})") from None
    found = _find(document)
    if found is None:
        raise ConfigError(
            f"{ACCEPTANCE_FLAG} {file}: has no proposed_per_position and accepted_per_position "
            f"with drafts; a run with {FLAG} has"
        )
    # Few chains are long. A place that few of them have says little: the last before it counts on.
    least = max(1, found.proposed[0] // RARE)
    pairs = zip(found.accepted, found.proposed, strict=True)
    rates = [accepted / proposed for accepted, proposed in pairs if proposed >= least]
    return [min(rates[: place + 1]) for place in range(len(rates))]


class _ByPlace(NamedTuple):
    proposed: list[int]
    accepted: list[int]


def _find(document: Any) -> _ByPlace | None:
    """The first counts of drafts in a document, wherever they stand."""
    if isinstance(document, dict):
        proposed: Any = document.get("proposed_per_position")
        accepted: Any = document.get("accepted_per_position")
        if _are_counts(proposed, accepted):
            return _ByPlace(proposed, accepted)
        document = list(document.values())
    if isinstance(document, list):
        return next((found for each in document if (found := _find(each)) is not None), None)
    return None


def _are_counts(proposed: Any, accepted: Any) -> bool:
    if not isinstance(proposed, list) or not isinstance(accepted, list):
        return False
    are_whole = all(type(each) is int and each >= 0 for each in (*proposed, *accepted))
    return are_whole and len(proposed) == len(accepted) > 0 and proposed[0] > 0


def simulated_drafts(
    options: SpeculationOptions, hardware: HardwareSpec, draft: DraftModel | None
) -> SimulatedDrafts | None:
    """What proposes in a replica; `draft` is the model of method draft_model. Raises
    ConfigError."""
    found = proposer(options)
    if found is None or options.speculative_acceptance is None:
        return None
    method, own = found
    time, longest = None, None
    if draft is not None:
        time = CostModel(draft.program, hardware, draft.deployment).step_time
        longest = draft.program.max_model_len
    return SimulatedDrafts(
        method=method,
        max_drafts=own.num_speculative_tokens,
        acceptance=read_acceptance(options.speculative_acceptance),
        draft_time=time,
        max_model_len=longest,
    )


def notes_on_drafts(options: SpeculationOptions) -> tuple[str, ...]:
    """What a reader of the numbers must know."""
    found = proposer(options)
    if found is None:
        return ()
    is_model = found[0] == "draft_model"
    cost = "at the price of the draft model's passes" if is_model else "for nothing"
    return (f"drafts are proposed {cost}, and are right as often as {ACCEPTANCE_FLAG} says",)


def beside(target: MemoryFit, draft: MemoryFit) -> MemoryFit:
    """What is left for blocks where a draft model's weights and KV share the memory: each block has
    room for both."""
    weights = target.weight_bytes + draft.weight_bytes
    activations = target.activation_bytes + draft.activation_bytes
    block_bytes = target.block_bytes + draft.block_bytes
    return replace(
        target,
        weight_bytes=weights,
        activation_bytes=activations,
        block_bytes=block_bytes,
        num_blocks=max(0, (target.usable_bytes - weights - activations) // block_bytes),
    )
