"""Small random models for tests of equal answers: a llama and the one with the most kinds of
layers, each on the reference backend and, in other formats, on the native one."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from fake_device import FakeDevice
from native import cpu_backend
from safetensors.numpy import save_file

from duetto.backends.backend import Backend
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.config import SchedulerConfig
from duetto.core.executor import Executor
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.models.programs import load_program
from duetto.program.kv_size import bytes_per_block
from duetto.program.rewrites.headless import headless
from duetto.runner.device_runner import DeviceRunner
from duetto.runner.masks import Masks
from duetto.runner.model_runner import ModelRunner
from duetto.runner.proposers.draft_model import DraftModelProposer
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.mover import TierRoom
from duetto.scheduler.drafts import DraftPolicy
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.tiers import NO_TIERS, Tiers, TierSizes

BLOCK_SIZE = 8
NUM_BLOCKS = 128
MAX_LEN = 192
VOCAB = 101
EMBEDDING = 0.15  # deviation of its weights, beside 0.3
NOISE = 0.05  # of the noisy twin, relative to its weights

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": True,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@dataclass(frozen=True)
class Kind:
    """A config, and how it is computed."""

    config: dict
    backend: str
    dtype: str
    quantization: str | None
    kv_dtype: str
    is_device: bool = False  # it computes behind its host, with steps in flight

    def __str__(self) -> str:
        formats = (
            self.dtype,
            self.quantization,
            f"{self.kv_dtype}-kv",
            self.is_device and "device",
        )
        return "-".join([self.config["model_type"], self.backend, *filter(None, formats)])


KINDS = (
    Kind(LLAMA, "reference", "float32", None, "bfloat16"),
    Kind(GEMMA, "reference", "float32", None, "bfloat16"),
    Kind(GEMMA, "cpu", "float32", None, "float16"),
    Kind(LLAMA, "cpu", "bfloat16", None, "bfloat16"),
    Kind(GEMMA, "cpu", "bfloat16", "int8", "int8"),
    Kind(LLAMA, "cpu", "float32", "int4", "float32"),
    Kind(LLAMA, "cpu", "float32", None, "float16", is_device=True),
)


@dataclass(frozen=True)
class Model:
    program: object
    backend: Backend
    kv_dtype: str
    noisy_backend: Backend  # of the same program, whose weights are a little different
    is_device: bool = False

    def engine(
        self,
        *,
        at_once: bool = False,
        proposers: Mapping[str, Proposer] | None = None,
        drafts: DraftPolicy | None = None,
        decode: Callable[[Sequence[int], bool], str] | None = None,
        depth: int | None = None,
        executor: Callable[[Executor], Executor] = lambda runner: runner,
        step_times: Any = None,
        clock: Callable[[], float] = monotonic,
        tiers: TierRoom | None = None,
        masks: Masks | None = None,
        grammar_drafts: DraftPolicy | None = None,
        **options: Any,
    ) -> Engine:
        """`executor` makes of the runner what the engine gets. `at_once`: not on the device."""
        options = {"num_blocks": NUM_BLOCKS, "max_num_batched_tokens": MAX_LEN} | options
        config = SchedulerConfig(max_model_len=MAX_LEN, block_size=BLOCK_SIZE, **options)
        sizes = config.num_blocks, BLOCK_SIZE, self.kv_dtype
        if depth is None:
            depth = int(self.is_device and not at_once)
        runner: ModelRunner | DeviceRunner
        if self.is_device and not at_once:
            device = FakeDevice(self.backend)
            runner = DeviceRunner(self.program, device, *sizes, proposers, depth, tiers, masks)
        else:
            runner = ModelRunner(self.program, self.backend, *sizes, proposers, depth, tiers, masks)
        step_time = None if step_times is None else step_times.late_time
        scheduler = Scheduler(config, step_time, drafts, _tiers(tiers), grammar_drafts)
        make_engine = SilentEngine if self.is_device else Engine
        return make_engine(scheduler, executor(runner), decode, clock, step_times, depth)

    def room(self, num_slots: int, disk: DiskTier | None = None) -> TierRoom:
        """So many slots of this model's blocks."""
        return TierRoom(num_slots, self.block_bytes, disk)

    @property
    def block_bytes(self) -> int:
        if isinstance(self.backend, ReferenceBackend):
            return bytes_per_block(self.program, BLOCK_SIZE, self.kv_dtype)
        return self.backend.allocate_kv(1, BLOCK_SIZE, self.kv_dtype).num_bytes

    def draft_model(self, num_blocks: int = NUM_BLOCKS) -> DraftModelProposer:
        """The noisy twin proposes: mostly the same tokens."""
        return DraftModelProposer(
            self.program,
            self.noisy_backend,
            vocab_size=VOCAB,
            num_blocks=num_blocks,
            num_scratch_blocks=8,
            block_size=BLOCK_SIZE,
            kv_dtype=self.kv_dtype,
            max_requests=32,
            max_model_len=MAX_LEN,
        )


def silenced(request: Request) -> Request:
    """Two of three requests are not to tell log-probabilities: those a device samples itself."""
    if request.seed % 3:
        request.sampling = replace(request.sampling, logprobs=None)
    return request


class SilentEngine(Engine):
    def add(self, request: Request) -> None:
        super().add(silenced(request))


def _tiers(room: TierRoom | None) -> Tiers:
    if room is None:
        return Tiers(NO_TIERS, BLOCK_SIZE)
    keys = [] if room.disk is None else room.disk.folder.keys
    return Tiers(TierSizes(room.num_slots, room.disk is not None), BLOCK_SIZE, keys)


def make_model(kind: Kind, directory: Path) -> Model:
    (directory / "config.json").write_text(json.dumps(kind.config))
    config, program = load_program(directory)
    rng = np.random.default_rng(5)
    tensors = _random_tensors(program, config, rng)
    noisy = {
        name: tensor + NOISE * (tensor.ndim > 1) * tensor.std() * rng.standard_normal(tensor.shape)
        for name, tensor in tensors.items()
    }
    twin = {name: tensor.astype(np.float32) for name, tensor in noisy.items()}
    return Model(
        program,
        _backend(kind, directory / "own", program, tensors),
        kind.kv_dtype,
        _backend(kind, directory / "noisy", program, twin),
        kind.is_device,
    )


def make_embedding_model(kind: Kind, directory: Path) -> Model:
    """Without a head: it gives hidden states."""
    (directory / "config.json").write_text(json.dumps(kind.config))
    config, program = load_program(directory)
    tensors = _random_tensors(program, config, np.random.default_rng(5))
    program = headless(program)
    backend = _backend(kind, directory / "own", program, tensors)
    return Model(program, backend, kind.kv_dtype, backend, kind.is_device)


def _backend(kind: Kind, directory: Path, program, tensors) -> Backend:
    directory.mkdir()  # of its own: weights may be mapped from the file
    save_file(tensors, directory / "model.safetensors")
    weights = load_weights(directory, program, kind.dtype)
    if kind.backend == "reference":
        return ReferenceBackend(program, weights)
    return cpu_backend(program, weights, kind.quantization)


def _random_tensors(program, config, rng):
    """A tensor for each source; stacked sources are separate, of the rows that each must have."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows_of = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
    tensors = {}
    for spec in program.weights.values():
        for source in spec.sources:
            rows = rows_of.get(source.split(".")[-2], spec.shape[0] // len(spec.sources))
            shape = (rows, *spec.shape[1:])
            scale = 0.3 if len(shape) > 1 else 1.0
            if "embed" in source:  # small, or a model with tied weights says its last token again
                scale = EMBEDDING
            tensors[source] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors
