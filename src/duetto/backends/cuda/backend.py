"""The GPU backend: a step's arrays to the device, a Program's launches, and what it gives.

Everything goes to one stream, in the order in which steps are started. Knows what a DeviceBackend
knows; no kernel and no tile.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from duetto.backends.backend import (
    AttentionLook,
    FloatArray,
    IntArray,
    KVMoves,
    LayersDone,
    ScoreArray,
    StepArrays,
)
from duetto.backends.blocks import Bytes
from duetto.backends.cuda.arena import (
    CudaArena,
    allocate_arena,
    export_blocks,
    import_blocks,
    move_kv,
    read_kv,
)
from duetto.backends.cuda.graphs import Recorder, StepGraphs
from duetto.backends.cuda.held import (
    allocate_buffers,
    make_partials,
    make_rotations,
)
from duetto.backends.cuda.inputs import InputSizes, StepInputs
from duetto.backends.cuda.kernels.attention_launch import capability_of, many_rows
from duetto.backends.cuda.kernels.linear import launch_linear
from duetto.backends.cuda.kernels.sampler import SampleTensors, make_scratch, sample
from duetto.backends.cuda.limits import StepLimits, graph_sizes
from duetto.backends.cuda.looks import SeenBy
from duetto.backends.cuda.loss import telling_of_loss
from duetto.backends.cuda.ops import LAUNCHES, DeviceRun, HeldTensors, LookAtQueries, Multiply
from duetto.backends.cuda.padding import (
    greedy_samples,
    padded_samples,
    padded_step,
    padding_prompt,
    padding_step,
)
from duetto.backends.cuda.query_tiles import TilePlan, most_tiles, plan_tiles
from duetto.backends.cuda.results import Finished, ResultPlaces
from duetto.backends.cuda.sizes import buffer_sizes
from duetto.backends.cuda.tensors import StepTensors
from duetto.backends.cuda.weights import CudaWeights
from duetto.backends.device import SampleArrays, Started
from duetto.backends.looks import deviations
from duetto.core.errors import ConfigError, EngineError
from duetto.program.dtype import Dtype, KVDtype
from duetto.program.looks import LOOKED_LAYER, first_attending_layer, num_ops_up_to_kv
from duetto.program.op import Op
from duetto.program.ops import Attention, Embed
from duetto.program.program import Program
from duetto.program.rewrites.runs import GPU_RUNS, fuse_runs
from duetto.program.rotation import key_rotations
from duetto.program.shape import SELECTED

_NO_ROWS = (
    "--backend cuda: KV links do not read a GPU's memory yet; prefill and decode on one engine "
    "(--role both), or use --backend cpu"
)
_WARM_UP_TOKENS = (1, 17, 33, 65, 513)  # a step of each of the tiles that there are
IN_FLIGHT = 3  # steps: one that runs, one behind it, and one whose result is being read
_TORCH_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float32", "float16", "bfloat16")}


class CudaBackend:
    """Computes on one device. What a request gets depends on no company, bit for bit; on the kind
    of device it does, in the last bits."""

    def __init__(
        self,
        program: Program,
        weights: CudaWeights,
        dtype: Dtype,
        limits: StepLimits,
        device: torch.device,
        *,
        recorder: Recorder | None = None,
        multiply: Multiply = launch_linear,
    ) -> None:
        """`recorder` records steps of next tokens; None: they are launched kernel by kernel.

        Raises ConfigError for an operation that has no kernel here, and for a part of a program.
        """
        self._program = fuse_runs(program, GPU_RUNS)
        self._limits, self._device, self._recorder = limits, device, recorder
        self._every, self._selected = _split(self._program)
        self._group, head_dim = _heads_of(self._program)
        self._many_rows = many_rows(head_dim, _TORCH_DTYPES[dtype], capability_of(device))
        self._rotations = key_rotations(program)
        self._num_ids = min(
            weights.matrices[op.weight].shape[0] for op in program.ops if isinstance(op, Embed)
        )
        buffers = allocate_buffers(self._program, limits, _TORCH_DTYPES[dtype], device)
        self._logits = buffers[self._program.logits.buffer]
        self._held = HeldTensors(
            weights,
            multiply,
            buffers,
            frozenset(
                name for name, size in buffer_sizes(self._program).items() if size.is_selected
            ),
            make_rotations(self._program, device),
            make_partials(self._program, limits, device),
            torch.zeros(limits.num_tokens, dtype=torch.int32, device=device),
        )
        self._scratch = make_scratch(limits.num_logit_rows, self._logits.shape[1], device)
        self._results = ResultPlaces(
            limits.num_logit_rows, self._logits.shape[1], device, IN_FLIGHT
        )
        self._graphs: StepGraphs | None = None
        self._graphs_arena: CudaArena | None = None
        self._inputs: StepInputs | None = None  # of steps that are launched kernel by kernel ...
        self._graph_inputs: StepInputs | None = None  # ... and of recorded ones
        self._graph_tiles: Mapping[int, TilePlan] = {}

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> CudaArena:
        """An arena for num_blocks blocks, and one more for padding; records the graphs of steps of
        next tokens over it. One arena at a time has graphs: the one allocated last."""
        arena = allocate_arena(self._program.kv, num_blocks, block_size, dtype, self._device)
        num_tokens, num_runs = self._limits.num_tokens, self._limits.num_runs
        num_table_entries = num_runs * -(-self._limits.max_model_len // block_size)
        num_tiles = most_tiles(num_tokens, self._group)
        sizes = InputSizes(num_tokens, num_tokens, num_tokens, num_tiles, num_table_entries)
        self._inputs = StepInputs(sizes, self._device, IN_FLIGHT)
        if self._recorder is not None:
            self._record(arena, self._recorder, num_table_entries)
        return arena

    def _record(self, arena: CudaArena, recorder: Recorder, num_table_entries: int) -> None:
        limits = self._limits
        most = min(limits.num_runs, limits.num_logit_rows, limits.num_few_tokens)
        num_tiles = most_tiles(most, self._group)
        sizes = InputSizes(most, most, most, num_tiles, num_table_entries)
        inputs = self._graph_inputs = StepInputs(sizes, self._device, IN_FLIGHT)

        # Of a step of next tokens they depend on the number of requests alone.
        tiles = self._graph_tiles = {
            size: self._tiles(padding_step(size, arena)) for size in graph_sizes(most)
        }

        def launch(size: int) -> None:
            step = inputs.tensors(size, size, size, tiles[size])
            run = DeviceRun(step, arena, self._held, size, 0)
            _launch(self._every, run)
            self._finish(run, inputs, True, 0, size)

        self._warm_up(arena)
        for size in graph_sizes(most):  # what is compiled, or allocated once, cannot be recorded
            step = padding_step(size, arena)
            inputs.send(step, None, greedy_samples(size), tiles[size])
            launch(size)
        self._graphs = StepGraphs(recorder, graph_sizes(most), launch)
        self._graphs_arena = arena

    def _warm_up(self, arena: CudaArena) -> None:
        """Compile what steps with prompts launch, by prompts of padding."""
        if self._device.type == "cuda":  # nothing else compiles
            for size in _WARM_UP_TOKENS:
                step = padding_prompt(min(size, self._limits.num_tokens), arena)
                self._start(step, arena, greedy_samples(1), None, False)

    def run(self, step: StepArrays, kv: CudaArena) -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary]."""
        return np.array(self.start(step, kv, None, wants_logits=True).logits())

    def start(
        self,
        step: StepArrays,
        kv: CudaArena,
        sampling: SampleArrays | None,
        feedback: IntArray | None = None,
        *,
        wants_logits: bool = False,
    ) -> Started:
        """Put a step on the device's queue, and return before it has run."""
        self._check(step, kv, feedback)
        with telling_of_loss(self._device):
            if sampling is not None and kv is self._graphs_arena and _is_next_tokens(step):
                size = self._graphs.size_for(len(step.token_ids)) if self._graphs else None
                if size is not None:
                    return self._replay(size, step, kv, sampling, feedback, wants_logits)
            return self._start(step, kv, sampling, feedback, wants_logits)

    def _replay(
        self,
        size: int,
        step: StepArrays,
        kv: CudaArena,
        sampling: SampleArrays,
        feedback: IntArray | None,
        wants_logits: bool,
    ) -> Started:
        assert self._graphs is not None and self._graph_inputs is not None
        count = len(step.token_ids)
        padded = padded_step(step, size, kv)
        if feedback is not None:
            feedback = np.concatenate((feedback, np.full(size - count, -1, np.int32)))
        drawn = padded_samples(sampling, size)
        self._graph_inputs.send(padded, feedback, drawn, self._graph_tiles[size])
        self._graphs.replay(size)
        logits = self._logits[:count] if wants_logits else None
        return self._results.fetch(self._held.sampled[:count], logits)

    def _start(
        self,
        step: StepArrays,
        kv: CudaArena,
        sampling: SampleArrays | None,
        feedback: IntArray | None,
        wants_logits: bool,
        look: LookAtQueries | None = None,
    ) -> Started:
        """Kernel by kernel."""
        inputs, tensors = self._send(step, feedback, sampling)
        num_rows = len(step.logit_rows)
        run = DeviceRun(tensors, kv, self._held, len(step.token_ids), 0, look)
        _launch(self._every, run)
        if num_rows <= len(self._logits):
            self._finish(run, inputs, sampling is not None, 0, num_rows)
            sampled = self._held.sampled[:num_rows] if sampling is not None else None
            return self._results.fetch(sampled, self._logits[:num_rows] if wants_logits else None)
        return self._finish_in_parts(run, inputs, sampling is not None, num_rows, wants_logits)

    def _send(
        self, step: StepArrays, feedback: IntArray | None, sampling: SampleArrays | None
    ) -> tuple[StepInputs, StepTensors]:
        """A step that is not recorded, and where it lies on the device."""
        tiles, inputs = self._tiles(step), self._inputs_for(step)
        inputs.send(step, feedback, sampling, tiles)
        counts = len(step.token_ids), len(step.context_lens), len(step.logit_rows)
        return inputs, inputs.tensors(*counts, tiles)

    def _finish(
        self, run: DeviceRun, inputs: StepInputs, samples: bool, start: int, end: int
    ) -> None:
        """The operations on selected rows start ... end, and their samples."""
        if start == end:  # a part of a prompt, of which nothing is wanted
            return
        step = run.step._replace(logit_rows=run.step.logit_rows[start:end])
        part = DeviceRun(step, run.kv, run.held, run.num_tokens, end - start)
        _launch(self._selected, part)
        if samples:
            rows = SampleTensors(*(each[start:end] for each in inputs.sample_tensors(end)))
            logits, out = self._logits[: end - start], self._held.sampled[start:end]
            sample(logits, rows, self._scratch, out)

    def _finish_in_parts(
        self, run: DeviceRun, inputs: StepInputs, samples: bool, num_rows: int, wants_logits: bool
    ) -> Started:
        """More rows than logits are held of, as of a prompt that is scored: waits for each part."""
        logits = np.empty((num_rows, self._logits.shape[1]), np.float32)
        for start in range(0, num_rows, len(self._logits)):
            end = min(num_rows, start + len(self._logits))
            self._finish(run, inputs, samples, start, end)
            if wants_logits:
                logits[start:end] = self._logits[: end - start].float().cpu().numpy()
        tokens = self._held.sampled[:num_rows].cpu().numpy() if samples else None
        return Finished(tokens, logits if wants_logits else None)

    def _tiles(self, step: StepArrays) -> TilePlan:
        return plan_tiles(step, self._group, self._many_rows, self._limits.num_few_tokens)

    def _inputs_for(self, step: StepArrays) -> StepInputs:
        """A step of reused texts may have many runs, each with a table: room for more of them than
        there are requests is made when it is needed, and kept."""
        assert self._inputs is not None, "no KV was allocated"
        sizes = self._inputs.sizes
        if step.block_tables.size > sizes.num_table_entries:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            sizes = sizes._replace(num_table_entries=2 * step.block_tables.size)
            self._inputs = StepInputs(sizes, self._device, IN_FLIGHT)
        return self._inputs

    def move_kv(self, moves: KVMoves, kv: CudaArena) -> None:
        """Bring tokens' KV to other slots, their keys turned for other positions."""
        move_kv(kv, moves, self._rotations)

    def read_kv(self, layer: int, slots: IntArray, kv: CudaArena) -> tuple[FloatArray, FloatArray]:
        """The keys and values in some slots, in fp32."""
        return read_kv(kv, layer, slots)

    def look_attention(
        self, step: StepArrays, kv: CudaArena, looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """As `run`; and how much attention some runs' tokens give to some positions."""
        self._check(step, kv, None)
        seen = [SeenBy.of(each, step, self._group, self._device) for each in looks]
        first_layer = first_attending_layer(len(kv.layers))

        def look(op: Attention, q: Tensor, run: DeviceRun) -> None:
            if op.layer >= first_layer:
                for each in seen:
                    each.add(op, q, run)

        logits = np.array(self._start(step, kv, None, None, True, look).logits())
        return logits, [each.scores() for each in seen]

    def look_deviation(self, step: StepArrays, kv: CudaArena) -> ScoreArray:
        """Compute up to layer 1's KV; how far it is from what lay in its place."""
        ops = self._program.ops[: num_ops_up_to_kv(self._program, self._program.ops)]
        self._check(step, kv, None)
        before = self.read_kv(LOOKED_LAYER, step.slots, kv)
        _, tensors = self._send(step, None, None)
        _launch(ops, DeviceRun(tensors, kv, self._held, len(step.token_ids), 0))
        return deviations(before, self.read_kv(LOOKED_LAYER, step.slots, kv))

    def export_blocks(
        self, kv: CudaArena, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """The bytes of whole blocks, all layers; zeros behind the last token of one that is not
        full."""
        export_blocks(kv, blocks, out, num_tokens)

    def import_blocks(self, kv: CudaArena, blocks: Sequence[int], data: Bytes) -> None:
        """What `export_blocks` gave, into blocks of the arena."""
        import_blocks(kv, blocks, data)

    def block_rows(self, kv: CudaArena) -> list[list[Bytes]]:
        """A seam: a link that reads the device's memory (NIXL, UCX) would ask here."""
        del kv
        raise EngineError(_NO_ROWS)

    @property
    def layers_done(self) -> LayersDone:
        """Nothing is told of a step under way; an event of each layer would. It must not raise:
        isinstance of a protocol asks for every property."""
        return LayersDone(0, 0)

    def _check(self, step: StepArrays, kv: CudaArena, feedback: IntArray | None) -> None:
        """What is out of range would be read or written elsewhere: nothing checks it later."""
        num_slots = kv.num_blocks * kv.block_size
        _check_within("slot", step.slots, num_slots)
        _check_within("block", step.block_tables, kv.num_blocks)
        _check_within("position", step.positions, self._limits.max_model_len)
        _check_within("row", step.logit_rows, len(step.token_ids))
        assert len(step.token_ids) <= self._limits.num_tokens, "more tokens than there is room for"
        ids = step.token_ids
        if feedback is not None:
            _check_within("sample", feedback + 1, len(self._held.sampled) + 1)
            ids = np.where(feedback < 0, ids, 0)
        _check_within("token", ids, self._num_ids)


def _check_within(what: str, numbers: IntArray, count: int) -> None:
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise AssertionError(f"a {what} outside 0 ... {count - 1}")


def _launch(ops: Sequence[Op], run: DeviceRun) -> None:
    for op in ops:
        LAUNCHES[type(op)](op, run)


def _split(program: Program) -> tuple[list[Op], list[Op]]:
    """The operations on all rows, and those on selected rows behind them."""
    if not program.is_whole:
        raise ConfigError("--backend cuda: runs no part of a program (--tp, --pp); accepted: 1")
    for op in program.ops:
        if type(op) not in LAUNCHES:
            raise ConfigError(
                f"--backend cuda: knows no operation {type(op).__name__}, which this model has; "
                "--backend reference may"
            )
    every = [op for op in program.ops if op.rows != SELECTED]
    selected = [op for op in program.ops if op.rows == SELECTED]
    assert [*every, *selected] == list(program.ops), "rows are selected, and then all are computed"
    return every, selected


def _heads_of(program: Program) -> tuple[int, int]:
    """Query heads that share a KV head, and the largest head's size."""
    attentions = [op for op in program.ops if isinstance(op, Attention)]
    groups = {op.num_heads // op.num_kv_heads for op in attentions}
    if len(groups) != 1:
        raise ConfigError(
            f"--backend cuda: layers share KV heads among {sorted(groups)} query heads each; "
            "accepted: the same number in all layers"
        )
    return groups.pop(), max(op.head_dim for op in attentions)


def _is_next_tokens(step: StepArrays) -> bool:
    """Whether every run has one token, whose logits are wanted."""
    count = len(step.token_ids)
    return count == len(step.context_lens) == len(step.logit_rows)
