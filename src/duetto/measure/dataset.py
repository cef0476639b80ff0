"""Which workload a benchmark runs, as one set of options: the flags of `bench serve|throughput`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duetto.core.errors import ConfigError
from duetto.measure.traces import TraceFit, read_azure, read_mooncake, read_sharegpt
from duetto.measure.workload import (
    LengthKind,
    Lengths,
    SharedPrefixes,
    Workload,
    check_num_requests,
    check_seed,
    random_workload,
)

DatasetName = Literal["random", "azure", "mooncake", "sharegpt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """Which prompts to send, and how long the answers are."""

    dataset_name: DatasetName = "random"
    """random: synthetic. azure: CSV of lengths. mooncake: JSON lines with hash_ids. sharegpt: JSON
    list of conversations."""
    dataset_path: Path | None = None
    """The file of a dataset that is not random."""
    num_prompts: int = 100
    """How many requests; of a file, the first ones."""
    random_input_len: int = 128
    """Mean tokens per prompt, without the shared prefix."""
    random_output_len: int = 64
    """Mean tokens per answer."""
    random_lengths: LengthKind | None = None
    """How lengths are distributed; by default fixed, or uniform with --random-range-ratio."""
    random_range_ratio: float = 0.0
    """uniform: lengths from mean * (1 - ratio) to mean * (1 + ratio); lognormal: the standard
    deviation of the logarithm."""
    random_prefix_len: int = 0
    """Tokens of a prefix that prompts share."""
    random_num_prefixes: int = 1
    """How many different shared prefixes there are."""
    random_vocab_size: int = 256
    """Token ids are drawn below this; 256 is within every common vocabulary."""
    trace_length_scale: float = 1.0
    """Multiplies every length of a trace, so that a small model can run it."""
    max_input_len: int | None = None
    """Longer prompts of a trace are cut (sharegpt: left out)."""
    max_output_len: int | None = None
    """Longer answers of a trace are cut."""
    sharegpt_output_len: int | None = None
    """Replaces the lengths of the recorded answers."""

    @property
    def has_times(self) -> bool:
        """Whether the dataset records when its requests came."""
        return self.dataset_name in ("azure", "mooncake")

    def load(self, count_tokens: Callable[[str], int], seed: int) -> Workload:
        """The workload, with the trace's own arrival times or all at 0.

        `count_tokens` is called for sharegpt only. Raises ConfigError, naming the flag or the file.
        """
        check_num_requests(self.num_prompts)
        check_seed(seed)
        if self.dataset_name == "random":
            return self._random(seed)
        if self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name} needs a file: --dataset-path")
        fit = TraceFit(self.trace_length_scale, self.max_input_len, self.max_output_len)
        if self.dataset_name == "sharegpt":
            return read_sharegpt(
                self.dataset_path,
                count_tokens=count_tokens,
                num_requests=self.num_prompts,
                output_len=self.sharegpt_output_len,
                fit=fit,
            )
        read = read_azure if self.dataset_name == "azure" else read_mooncake
        return read(
            self.dataset_path,
            vocab_size=self.random_vocab_size,
            num_requests=self.num_prompts,
            fit=fit,
            seed=seed,
        )

    def _random(self, seed: int) -> Workload:
        if self.dataset_path is not None:
            raise ConfigError("--dataset-path with --dataset-name random: name the file's kind")
        spread = self.random_range_ratio
        kind: LengthKind = self.random_lengths or ("uniform" if spread else "fixed")
        if kind == "fixed" and spread:
            raise ConfigError(
                f"--random-range-ratio {spread} with --random-lengths fixed: leave one of them out"
            )
        return random_workload(
            self.num_prompts,
            input_lengths=Lengths(self.random_input_len, kind, spread),
            output_lengths=Lengths(self.random_output_len, kind, spread),
            vocab_size=self.random_vocab_size,
            prefixes=SharedPrefixes(self.random_prefix_len, self.random_num_prefixes),
            seed=seed,
        )
