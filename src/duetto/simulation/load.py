"""Which load is simulated, as one set of options: the flags of `simulate` and `plan`.

Names and meanings are those of `bench serve`, so that one load can be measured and simulated.
"""

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Literal

from duetto.core.errors import ConfigError
from duetto.measure.traces import TraceFit
from duetto.measure.workload import LengthKind, Lengths, SharedPrefixes, check_num_requests
from duetto.simulation.workload import DrawnDocuments, Traffic, read_trace, synthetic, timed

Arrivals = Literal["poisson", "uniform", "gamma"]
_OF_TRACES = ("trace_speed", "trace_length_scale", "max_input_len", "max_output_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficOptions:
    """What arrives, and when."""

    trace: Path | None = None
    """Azure's CSV or Mooncake's JSON lines; without one, the load is synthetic."""
    num_prompts: int | None = None
    """How many requests; of a trace the first ones (all if left out), else 1000."""
    request_rate: float | None = None
    """Requests per second; of a trace its own times if left out, else 1."""
    arrivals: Arrivals = "poisson"
    """With a rate: gaps that are exponential, all equal, or of a gamma distribution."""
    burstiness: float = 1.0
    """Shape of the gamma distribution: 1 is a Poisson process, below 1 is burstier."""
    trace_speed: float = 1.0
    """How many times as fast as recorded a trace is."""
    trace_length_scale: float = 1.0
    """Multiplies every length of a trace."""
    max_input_len: int | None = None
    """Longer prompts of a trace are cut."""
    max_output_len: int | None = None
    """Longer answers of a trace are cut."""
    random_input_len: int = 1024
    """Mean tokens per prompt, without the shared prefix."""
    random_output_len: int = 128
    """Mean tokens per answer."""
    random_lengths: LengthKind = "fixed"
    """How lengths are distributed."""
    random_range_ratio: float = 0.0
    """uniform: lengths from mean * (1 - ratio) to mean * (1 + ratio); lognormal: the standard
    deviation of the logarithm."""
    random_prefix_len: int = 0
    """Tokens of a prefix that prompts share."""
    random_num_prefixes: int = 1
    """How many different shared prefixes there are."""
    random_documents: int = 0
    """Documents in each prompt, before its own tokens, in random order."""
    random_document_len: int = 512
    """Tokens of each document."""
    random_num_documents: int = 100
    """How many different documents there are to draw from."""

    def load(self, seed: int) -> Traffic:
        """Raises ConfigError, naming the flag, or the file and the line."""
        if self.num_prompts is not None:
            check_num_requests(self.num_prompts)
        self._refuse_unused()
        return self._synthetic(seed) if self.trace is None else self._recorded(self.trace, seed)

    def _refuse_unused(self) -> None:
        """What would be accepted and ignored."""
        for entry in fields(self):
            if getattr(self, entry.name) == entry.default:
                continue
            flag = f"--{entry.name.replace('_', '-')}"
            if self.trace is None and entry.name in _OF_TRACES:
                raise ConfigError(f"{flag}: needs --trace")
            if self.trace is not None and entry.name.startswith("random_"):
                raise ConfigError(f"{flag} with --trace: the trace has lengths of its own")
            if self.trace is not None and self.request_rate is None and entry.name == "arrivals":
                raise ConfigError(
                    f"{flag} with --trace: the trace has times of its own; it needs --request-rate"
                )

    def _recorded(self, file: Path, seed: int) -> Traffic:
        fit = TraceFit(self.trace_length_scale, self.max_input_len, self.max_output_len)
        workload = read_trace(file, num_requests=self.num_prompts, fit=fit)
        if self.request_rate is None:
            return workload if self.trace_speed == 1 else workload.faster(self.trace_speed)
        if self.trace_speed != 1:
            raise ConfigError("--request-rate with --trace-speed: leave one of the two out")
        times = timed(
            len(workload.arrivals), self.request_rate, burstiness=self._burstiness, seed=seed
        )
        return workload.at(times)

    def _synthetic(self, seed: int) -> Traffic:
        kind, spread = self.random_lengths, self.random_range_ratio
        if kind == "fixed" and spread:
            kind = "uniform"  # vLLM's flag alone asks for this
        return synthetic(
            self.num_prompts or 1000,
            1.0 if self.request_rate is None else self.request_rate,
            input_lengths=Lengths(self.random_input_len, kind, spread),
            output_lengths=Lengths(self.random_output_len, kind, spread),
            burstiness=self._burstiness,
            prefixes=SharedPrefixes(self.random_prefix_len, self.random_num_prefixes),
            documents=self._documents(),
            seed=seed,
        )

    def _documents(self) -> DrawnDocuments | None:
        if not self.random_documents:
            for name in ("random_document_len", "random_num_documents"):
                if getattr(self, name) != getattr(type(self)(), name):
                    raise ConfigError(f"--{name.replace('_', '-')}: needs --random-documents")
            return None
        if self.random_prefix_len:
            raise ConfigError("--random-documents with --random-prefix-len: leave one of them out")
        return DrawnDocuments(
            self.random_documents, self.random_document_len, self.random_num_documents
        )

    @property
    def _burstiness(self) -> float:
        if self.arrivals != "gamma" and self.burstiness != 1:
            raise ConfigError(f"--burstiness with --arrivals {self.arrivals}: only for gamma")
        return inf if self.arrivals == "uniform" else self.burstiness
