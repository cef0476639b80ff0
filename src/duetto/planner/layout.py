"""What there is to choose of a deployment, and what the choices mean. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.core.options import (
    BATCHED_TOKENS,
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    SchedulingPolicy,
    check_choice,
    check_options,
    flag_of,
)
from duetto.core.speculation import SpeculativeConfig
from duetto.pricing.cost_model import Deployment
from duetto.pricing.gpus import GPU_EFFICIENCIES
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.host import computable
from duetto.program.dtype import DTYPES, KVDtype, auto_kv_dtype
from duetto.program.kv_size import kv_number_bytes
from duetto.program.program import Program
from duetto.program.shape import Precision
from duetto.routing.policies import RouterName

PrecisionName = Literal["float32", "bfloat16", "float16", "float8", "int8", "int4"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float8", "int8", "int4"]
KVName = Literal["auto", "float32", "bfloat16", "float16", "float8", "int8"]

# What counts with tiers only, and which.
_OF_TIERS = {
    "host_bandwidth": ("kv_offloading_size", "kv_offloading_disk_size"),
    "disk_read_bandwidth": ("kv_offloading_disk_size",),
    "disk_write_bandwidth": ("kv_offloading_disk_size",),
}
PRECISION_OF: Mapping[QuantizationName, PrecisionName] = {
    "int8": "int8",
    "int4": "int4",
    "fp8": "float8",
}
_WEIGHT_BYTES: Mapping[PrecisionName, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8": 1.0,
    "int8": 1.0,
    "int4": 0.5625,  # with a 16-bit scale for every 32
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What there is to choose of a deployment. Names and meanings are vLLM's where it has them."""

    tp: int = 1
    """Tensor parallelism: devices that share each layer; must divide the model's heads."""
    pp: int = 1
    """Pipeline parallelism: stages that share the layers."""
    micro_batches: int | None = None
    """Batches that may be in the stages of --pp at one time, each with its own requests and its
    share of the KV blocks; by default one for each stage."""
    replicas: int = 1
    """Engines that serve; with prefill replicas, those that decode."""
    prefill_replicas: int = 0
    """Engines that compute prompts only; 0: prompts are computed where they are decoded."""
    dtype: DtypeName = "auto"
    """What weights are stored in; auto is what config.json says, or bfloat16. float8 computes in
    float8, int8 and int4 in bfloat16; a host without these in float32 and int8."""
    kv_cache_dtype: KVName = "auto"
    """What keys and values are stored in; auto is what the weights are, or were before they were
    quantized."""
    kv_cache_memory_bytes: int | None = None
    """Memory for KV on each device; by default all that may be used, and on this host what serve
    takes."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step; 512 by default, or a whole context without chunking."""
    max_num_seqs: int = MAX_NUM_SEQS
    """Most requests that run at one time on a replica; with stages, in each batch under way."""
    max_model_len: int | None = None
    """Longest prompt and answer together; by default the model's own, or what fits."""
    target_itl: float | Literal["auto", "off"] | None = "auto"
    """Milliseconds that a step beside streams is to take at most; prompts are cut accordingly.
    auto is 250, or four steps of the streams alone if that is more; off is no limit."""
    block_size: int = BLOCK_SIZE
    """Tokens in a KV block."""
    graphs: bool | None = None
    """The device never waits for the host, as in engines of today: steps are replayed as graphs
    and prepared ahead. Assumed of GPUs; --no-graphs: launches and scheduling take what they did in
    vLLM of 2023."""
    enable_chunked_prefill: bool = True
    """Compute long prompts in parts that share steps with other requests."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """fcfs, priority, or static (batch by batch, to compare)."""
    router: RouterName = "least-loaded"
    """Who gets a request: round-robin, least-loaded, prefix-affinity, or predicted (where the
    first token should come first)."""
    max_local_prefill: int = 0
    """With prefill replicas: prompts of up to this many tokens are computed where they are
    decoded."""
    kv_bandwidth: float | None = None
    """GB/s from a prefill replica to those that decode; by default the hardware's own links."""
    kv_offloading_size: float | None = None
    """GiB of RAM of each replica for KV that leaves the cache; by default none, or a little beside
    a disk."""
    kv_offloading_disk_size: float | None = None
    """GiB of a disk of each replica for KV that others may reuse; by default none."""
    host_bandwidth: float | None = None
    """GB/s of copies of KV between a device and RAM; by default the hardware's own."""
    disk_read_bandwidth: float | None = None
    """GB/s of the disk; by default the hardware's own, which for GPUs is an NVMe drive's."""
    disk_write_bandwidth: float | None = None
    """GB/s of the disk."""
    gpu_memory_utilization: float | None = None
    """Part of the memory that may be used; 0.9 by default."""
    speculative_config: str | None = None
    """What proposes drafts, as JSON, like serve's; needs --speculative-acceptance. Methods ngram
    and suffix cost nothing here, draft_model the price of its own program."""
    speculative_model: str | None = None
    """A smaller model that proposes drafts: a directory, a config.json or a named shape."""
    speculative_acceptance: str | None = None
    """How often a draft is right if those before it are, like 0.8; or the part of chains in which
    the first, second, … is accepted, like 0.8,0.65,0.5; or a .json of a run that had drafts."""

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("tp", "pp", "replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more")
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ConfigError("--micro-batches: must be 1 or more")
        if self.prefill_replicas < 0:
            raise ConfigError("--prefill-replicas: must be 0 or more")
        check_choice("dtype", self.dtype, get_args(DtypeName))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVName))
        check_choice("router", self.router, get_args(RouterName))
        for name in ("kv_bandwidth", *_OF_TIERS):
            bandwidth = getattr(self, name)
            if bandwidth is not None and not 0 < bandwidth < float("inf"):
                raise ConfigError(f"{flag_of(name)} {bandwidth}: must be above 0")
        self._check_offloading()
        if self.max_local_prefill < 0:
            raise ConfigError(f"--max-local-prefill {self.max_local_prefill}: must be 0 or more")
        SpeculativeConfig.parse(self.speculative_config, self.speculative_model)

    def _check_offloading(self) -> None:
        if self.has_tiers and not self.enable_prefix_caching:
            raise ConfigError(
                "--kv-offloading-size and --kv-offloading-disk-size keep what "
                "--enable-prefix-caching finds: leave them out, or turn it on"
            )
        for name, needed in _OF_TIERS.items():
            if getattr(self, name) is not None and not any(getattr(self, n) for n in needed):
                raise ConfigError(f"{flag_of(name)}: needs {' or '.join(map(flag_of, needed))}")

    @property
    def has_tiers(self) -> bool:
        """Whether KV that leaves the cache is kept."""
        return self.kv_offloading_size is not None or self.kv_offloading_disk_size is not None

    @property
    def num_batches(self) -> int:
        """That may be under way in a replica at one time."""
        return 1 if self.pp == 1 else self.micro_batches or self.pp

    @property
    def devices_per_replica(self) -> int:
        return self.tp * self.pp

    @property
    def num_devices(self) -> int:
        return (self.replicas + self.prefill_replicas) * self.devices_per_replica

    @property
    def weights(self) -> PrecisionName:
        """What weights are stored in, where no config.json says it."""
        return "bfloat16" if self.dtype == "auto" else self.dtype

    @property
    def kv(self) -> KVDtype | Literal["float8"]:
        """What KV is stored in, where no config.json says what quantized weights were."""
        if self.kv_cache_dtype != "auto":
            return self.kv_cache_dtype
        return auto_kv_dtype("float32" if self.dtype == "float32" else "bfloat16")

    def on(self, hardware: HardwareSpec, program: Program) -> Deployment:
        """The deployment, in the arithmetic that the hardware has; weights are as it keeps them."""
        found = self.deployment(program)
        weight_bytes = hardware.weight_bytes.get(self.weights, found.precision.weight_bytes)
        precision = replace(found.precision, weight_bytes=weight_bytes)
        graphs = self.has_graphs(hardware)
        return computable(replace(found, precision=precision, graphs=graphs), hardware)

    def has_graphs(self, hardware: HardwareSpec) -> bool:
        if self.graphs is not None:
            return self.graphs
        return (
            hardware.efficiencies == GPU_EFFICIENCIES
        )  # a host that was measured took what it did

    def deployment(self, program: Program) -> Deployment:
        activations = 4.0 if self.dtype == "float32" else 2.0
        kv_bytes = 1.0  # float8 has no scale for each head
        if self.kv != "float8":
            kv_bytes = kv_number_bytes(program, self.kv)
        return Deployment(
            tensor_parallel=self.tp,
            pipeline_parallel=self.pp,
            precision=Precision(_WEIGHT_BYTES[self.weights], activations, kv_bytes),
            arithmetic="bfloat16" if self.dtype in ("int8", "int4") else self.weights,
            graphs=self.graphs is True,
        )

    @property
    def _tokens_a_step(self) -> str:
        if self.max_num_batched_tokens is None and not self.enable_chunked_prefill:
            return "a whole context a step"
        return f"{self.max_num_batched_tokens or BATCHED_TOKENS} tokens a step"

    def describe(self) -> str:
        """In a few words."""
        parts = [f"tp {self.tp}"]
        if self.pp > 1:
            parts.append(f"pp {self.pp}")
            if self.num_batches != self.pp:
                parts.append(f"micro-batches {self.num_batches}")
        if self.prefill_replicas:
            parts.append(f"{self.prefill_replicas} prefill + {self.replicas} decode")
        else:
            parts.append(f"{self.replicas} replica{'s' * (self.replicas > 1)}")
        return ", ".join(
            (*parts, self.weights, self._tokens_a_step, *self._drafts, *self._offloading)
        )

    @property
    def _offloading(self) -> tuple[str, ...]:
        parts = []
        if self.kv_offloading_size is not None:
            parts.append(f"KV in {self.kv_offloading_size:g} GiB of RAM")
        if self.kv_offloading_disk_size is not None:
            parts.append(f"KV on {self.kv_offloading_disk_size:g} GiB of disk")
        return tuple(parts)

    @property
    def _drafts(self) -> tuple[str, ...]:
        config = SpeculativeConfig.parse(self.speculative_config, self.speculative_model)
        if config is None:
            return ()
        return (f"drafts by {', '.join(config.methods)}, {self.speculative_acceptance} accepted",)

    def on_devices(self, hardware: HardwareSpec) -> str:
        """Which devices do what, in words: 4 of 8 h100: 2 replicas of 2 devices each, ..."""
        there = hardware.num_devices
        used = f"{self.num_devices} of {there}" if there else str(self.num_devices)
        number, each = self.replicas + self.prefill_replicas, self.devices_per_replica
        kinds = f"{self.replicas} replica{'s' * (number > 1)}"
        if self.prefill_replicas:
            kinds = f"{self.prefill_replicas} prefill and {self.replicas} decode replicas"
        size = f"{each} device{'s' * (each > 1)}" + " each" * (number > 1)
        parts = [f"{used} {hardware.name}: {kinds} of {size} (tp {self.tp}, pp {self.pp})"]
        if self.pp > 1:
            parts.append(f"up to {self.num_batches} batches under way")
        return ", ".join(
            (
                *parts,
                self.weights,
                self._tokens_a_step,
                f"{self.max_num_seqs} requests in one",
                *["graphs"] * self.has_graphs(hardware),
                *self._drafts,
                *self._offloading,
            )
        )


def with_weights(
    layout: Layout, stored: PrecisionName | None, quantization: QuantizationName
) -> Layout:
    """The layout with nothing "auto" about its weights: `stored` is what config.json says, and
    `quantization` the engine's own word for --dtype int8 and int4. Raises ConfigError for both."""
    whole = stored or "bfloat16"
    quantized = layout.dtype if layout.dtype in ("int8", "int4") else quantization
    if quantized != "none" and layout.kv_cache_dtype == "auto" and whole in DTYPES:
        layout = replace(layout, kv_cache_dtype=auto_kv_dtype(whole))
    if quantization != "none":
        precision = PRECISION_OF[quantization]
        if layout.dtype not in ("auto", precision):
            raise ConfigError(
                f"--dtype {layout.dtype} with --quantization {quantization}: leave one of them out"
            )
        return replace(layout, dtype=precision)
    return replace(layout, dtype=whole) if layout.dtype == "auto" else layout


def check_used(layout: Layout) -> None:
    """Raises ConfigError for flags of which this layout makes nothing."""
    if layout.pp == 1 and (layout.micro_batches or 1) > 1:
        raise ConfigError(f"--micro-batches {layout.micro_batches}: needs --pp of 2 or more")
    check_apart(layout)


def check_apart(layout: Layout) -> None:
    """Raises ConfigError for what counts only where prompts are computed apart, and is not."""
    if layout.prefill_replicas:
        return
    for name in ("kv_bandwidth", "max_local_prefill"):
        if getattr(layout, name):
            raise ConfigError(f"--{name.replace('_', '-')}: needs --prefill-replicas")


def draft_layout(layout: Layout) -> Layout:
    """How a draft model is laid out: as its target, but for what its options say of its own."""
    config = SpeculativeConfig.parse(layout.speculative_config, layout.speculative_model)
    plain = replace(layout, speculative_config=None, speculative_model=None)
    plain = replace(plain, speculative_acceptance=None)
    options = None if config is None else config.draft_model
    if options is None:
        return plain
    if options.kv_cache_dtype not in (None, "auto"):
        check_choice("kv_cache_dtype", options.kv_cache_dtype, get_args(KVName))
        plain = replace(plain, kv_cache_dtype=cast(KVName, options.kv_cache_dtype))
    if options.quantization in PRECISION_OF:
        plain = replace(plain, dtype=PRECISION_OF[cast(QuantizationName, options.quantization)])
    elif options.quantization == "none" and plain.dtype in PRECISION_OF.values():
        plain = replace(plain, dtype="bfloat16")
    return plain
