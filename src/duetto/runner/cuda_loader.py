"""How the GPU backend takes a model: what it needs of the device, and how weights get there.

All sizes are known before torch has allocated anything. Knows no KV plan and no batch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duetto.backends.backend import Backend
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.files import Progress
from duetto.core.options import GPU_MEMORY_UTILIZATION, batched_tokens
from duetto.core.speculation import SpeculativeConfig
from duetto.program.activations import LargestStep
from duetto.program.dtype import DTYPE_BYTES, Dtype, KVDtype, auto_kv_dtype
from duetto.program.kv_size import bytes_per_block
from duetto.program.ops import Linear
from duetto.program.program import Program
from duetto.program.shape import SELECTED
from duetto.runner.loaders import DeviceMemory, Loader

if TYPE_CHECKING:  # of a room that only what uses a GPU imports
    from duetto.backends.cuda.device import Gpu

# What has no tensor of ours: modules of kernels, the library's workspace, and what an allocator
# leaves between tensors. Of each graph: its nodes, on the device.
_BESIDE_BYTES = 256 << 20
_GRAPH_BYTES = 4 << 20
_MOST_FEW_TOKENS = 256  # each keeps sums of every split of a context


class CudaLoader:
    """Weights are quantized on the device, on their way from the checkpoint."""

    name = "cuda"
    num_batches = 1

    def __init__(self, program: Program, dtype: Dtype, args: EngineArgs, gpu: "Gpu") -> None:
        formats, device = _cuda("formats"), _cuda("device")
        _cuda("supported").check_program(program)
        self._program, self._dtype, self._args, self._gpu = program, dtype, args, gpu
        method = None if args.quantization == "none" else args.quantization
        self._formats = formats.choose_gpu_formats(program, dtype, method, args.quantization_skip)
        self.computed_by = gpu.computed_by
        self.auto_kv_dtype: KVDtype = auto_kv_dtype(dtype)
        self.weight_bytes: int = formats.device_weight_bytes(program, self._formats)
        self.notes: list[str] = []
        self.memory: DeviceMemory | None = None  # the interpreter's is the host's
        if not gpu.is_interpreter:
            utilization = args.gpu_memory_utilization or GPU_MEMORY_UTILIZATION
            usable = device.usable_memory_bytes(gpu, utilization)
            self.memory = DeviceMemory(gpu.name, gpu.memory_bytes, usable)

    def kv_block_bytes(self, block_size: int, dtype: KVDtype) -> int:
        return bytes_per_block(self._program, block_size, dtype)

    def held_bytes(self, block_size: int, kv_dtype: KVDtype) -> int:
        """Buffers, sums of splits, graphs, the library's results on their way, and the block that
        rows write to which only pad."""
        limits = self._limits(self._program)
        held: int = _cuda("sizes").held_bytes(self._program, limits, DTYPE_BYTES[self._dtype])
        held += self.kv_block_bytes(block_size, kv_dtype)
        if self._gpu.is_interpreter:
            return held
        held += limits.num_tokens * self._widest() * DTYPE_BYTES[self._dtype]
        num_graphs = len(_cuda("limits").graph_sizes(limits.num_runs))
        return held + _BESIDE_BYTES + num_graphs * _GRAPH_BYTES

    def _widest(self) -> int:
        """Numbers of one row of the widest product that the library may compute."""
        products = [op for op in self._program.ops if isinstance(op, Linear)]
        whole = [op for op in products if self._formats[op.weight].kind == self._dtype]
        return max((op.out.width for op in whole if op.rows != SELECTED), default=0)

    def step_bytes(self, step: LargestStep, kv_dtype: KVDtype) -> int:  # noqa: ARG002
        """Nothing is allocated in a step."""
        return 0

    def load(
        self,
        program: Program,
        model_dir: Path,
        on_progress: Progress | None,
        beside: Loader | None = None,
    ) -> Backend:
        """A draft model, beside another, gives logits only, so none of its steps is recorded."""
        with Checkpoint(model_dir, program) as checkpoint:
            backend, notes = _cuda("open").open_backend(
                checkpoint,
                program,
                self._dtype,
                self._formats,
                self._limits(program),
                self._gpu.device,
                on_progress,
                records=beside is None,
            )
        self.notes += notes
        found: Backend = backend
        return found

    def _limits(self, program: Program) -> Any:
        """The largest step that the scheduler may plan for these options."""
        args, length = self._args, program.max_model_len
        num_tokens = batched_tokens(args, length)
        config = SpeculativeConfig.parse(args.speculative_config, args.speculative_model)
        drafts = 0 if config is None else max(config.max_drafts.values(), default=0)
        num_rows = min(num_tokens, args.max_num_seqs * (1 + drafts))
        return _cuda("limits").StepLimits(
            num_tokens=num_tokens,
            num_runs=args.max_num_seqs,
            num_logit_rows=num_rows,
            max_model_len=length,
            num_few_tokens=min(num_rows, max(args.max_num_seqs, _MOST_FEW_TOKENS)),
        )


def _cuda(name: str) -> Any:
    """A file of the GPU backend, which needs torch."""
    try:
        return import_module(f"duetto.backends.cuda.{name}")
    except ImportError as error:
        raise ConfigError(f"--backend cuda: {error}; pip install 'duetto[cuda]'") from None
