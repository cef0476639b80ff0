"""Types of the native module (csrc/bindings.cpp). See docs/design/native-cpu.md.

Arrays are C-contiguous numpy arrays. bf16 travels as uint16, its bits. An argument of another type
(so an array of another dtype, another number of dimensions, or with gaps) is a TypeError; a size or
a number that cannot be is a ValueError that says what would be accepted. Nothing has been changed
then. Everything that takes long releases the GIL.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

WeightFormat: TypeAlias = Literal["f32", "bf16", "int8", "int4", "bf12"]
KvFormat: TypeAlias = Literal["f32", "f16", "bf16", "int8"]
Activation: TypeAlias = Literal["silu", "gelu_tanh"]
Ref: TypeAlias = tuple[int, int, int]  # buffer, start, width: columns of a plan's buffer
Norm: TypeAlias = tuple[NDArray[np.float32], float, float]  # weight [k], eps, offset
Source: TypeAlias = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]  # uint16: bf16

# -- the machine ----------------------------------------------------------------------------------

def cpu_features() -> list[str]:
    """Names as in /proc/cpuinfo of what kernels may use here, most basic first."""

def isas() -> list[str]:
    """Instruction sets that this build has and this machine can run, slowest first."""

def built_isas() -> list[str]:
    """Instruction sets that this build has, whether or not this machine can run them."""

def missing_features(isa: str) -> list[str]:
    """What this machine lacks to run a set of this build; empty if it can."""

def choose_isa(name: str | None = None) -> str:
    """The set to use: `name`, else DUETTO_ISA from the environment, else the fastest of isas()."""

def available_threads() -> int:
    """Processors that this process may use: its affinity, and its cgroup's quota rounded up."""

class Pool:
    """Threads that run a plan. The caller is one of them; the others sleep between steps.

    One step at a time: a second caller waits. A pool does not survive a fork: in the child it
    raises RuntimeError.
    """

    def __init__(self, num_threads: int = 0) -> None:
        """`num_threads` 0: available_threads()."""
    @property
    def num_threads(self) -> int: ...
    def barrier_ns(self, rounds: int = 10_000) -> float:
        """What one barrier costs, on average."""

# -- memory ---------------------------------------------------------------------------------------

class Arena:
    """Zeroed memory aligned to 2 MiB, in huge pages where the system gives them."""

    def __init__(self, num_bytes: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def array(self) -> NDArray[np.uint8]:
        """[num_bytes], the memory itself; keeps the arena alive."""

def checksum(array: NDArray[Any]) -> int:
    """XXH64 of an array's bytes, seed 0."""

# -- weights --------------------------------------------------------------------------------------

def packed_bytes(format: WeightFormat, group: int, n: int, k: int) -> tuple[int, int]:
    """Bytes of the packed data and of the scales (0 for f32 and bf16), multiples of 64."""

def pack(
    format: WeightFormat,
    group: int,
    sources: Sequence[Source],
    data: NDArray[np.uint8],
    scales: NDArray[np.uint8] | None,
    pool: Pool,
) -> int | None:
    """Pack the rows of `sources` ([n_i, k] each, one below the other) into `data` and `scales`.

    Both outputs are exactly as long as packed_bytes says and 64-byte aligned. Returns the first row
    that holds a NaN or an infinity, in which case the outputs are not to be used; else None.
    """

class Weight:
    """A packed weight [n, k] over arrays that it keeps alive."""

    def __init__(
        self,
        format: WeightFormat,
        group: int,
        n: int,
        k: int,
        data: NDArray[np.uint8],
        scales: NDArray[np.uint8] | None = None,
    ) -> None: ...
    @property
    def format(self) -> WeightFormat: ...
    @property
    def group(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def unpack(self, isa: str) -> NDArray[np.float32]:
        """[n, k]: what the kernels multiply with."""

# -- KV -------------------------------------------------------------------------------------------

class KvArena:
    """The KV of all layers, in an arena of its own, in the layout of one instruction set."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        layers: Sequence[tuple[int, int]],
        format: KvFormat,
        isa: str,
    ) -> None:
        """`layers`: (num_kv_heads, head_dim) of each."""
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def format(self) -> KvFormat: ...
    @property
    def num_bytes(self) -> int: ...
    def move(
        self,
        pool: Pool,
        from_slots: NDArray[np.int32],
        to_slots: NDArray[np.int32],
        turns: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]] | None],
    ) -> None:
        """The KV of N tokens into other slots too. Values as they are stored; keys turned by the
        layer's (cos, sin), [N, pairs] each, and stored again. None: keys as they are."""
    def read(
        self, pool: Pool, layer: int, slots: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of N tokens in one layer, as fp32: [N, num_kv_heads, head_dim] each."""
    def blocks(self, layer: int) -> NDArray[np.uint8]:
        """[num_blocks, block_bytes], the memory itself: to copy blocks, not to look inside."""

def kv_block_bytes(
    format: KvFormat, block_size: int, num_kv_heads: int, head_dim: int, isa: str
) -> int:
    """Bytes of one block of one layer."""

# -- links: the twins are in src/duetto/cluster/links/rows.py -------------------------------------

# `arrays` are [num_blocks, bytes], a block is its rows in all of them, and rows are those of
# `blocks` in their order. `start` counts their bytes. All raise ValueError for a block that is not
# there.

def copy_rows(
    arrays: Sequence[NDArray[np.uint8]],
    blocks: NDArray[np.int32],
    to_arrays: Sequence[NDArray[np.uint8]],
    to_blocks: NDArray[np.int32],
) -> None: ...
def send_rows(
    fd: int, arrays: Sequence[NDArray[np.uint8]], blocks: NDArray[np.int32], start: int, limit: int
) -> int:
    """One sendmsg straight from them: how many bytes went, or -errno."""

def receive_rows(
    fd: int, arrays: Sequence[NDArray[np.uint8]], blocks: NDArray[np.int32], start: int, limit: int
) -> int:
    """One recvmsg straight into them: how many bytes came, 0 at the end, or -errno."""

def put_rows(
    ring: NDArray[np.uint8],
    arrays: Sequence[NDArray[np.uint8]],
    blocks: NDArray[np.int32],
    start: int,
    patience_s: float,
    stop: NDArray[np.uint32],
) -> int:
    """Into a ring (4096 bytes, and a power of two) that another process reads: how many bytes went
    before nothing moved for `patience_s`, or stop[0] was not 0; -2 for a ring that is broken."""

def take_rows(
    ring: NDArray[np.uint8],
    arrays: Sequence[NDArray[np.uint8]],
    blocks: NDArray[np.int32],
    start: int,
    patience_s: float,
    stop: NDArray[np.uint32],
) -> int:
    """Out of a ring that another process writes, as put_rows."""

def drop_rows(
    ring: NDArray[np.uint8], count: int, patience_s: float, stop: NDArray[np.uint32]
) -> int:
    """As many bytes out of a ring, to nowhere."""

# -- ranks ----------------------------------------------------------------------------------------

class GroupEnded(RuntimeError):
    """Ranks cannot meet any more, and why; for good."""

class Group:
    """Shared memory in which the ranks of one engine meet.

    One process makes it and lends its descriptor to the others: `subprocess.Popen(...,
    pass_fds=[group.descriptor])` (the number is then the same there), or `socket.send_fds`. Each
    of them calls `Group.open(descriptor)`, and `Member(group, rank)` once; ranks that are threads
    of one process may share a Group. Who only watches over the ranks need not be one.

    A group ends, for all and for good, when a rank's process has ended while others wait for it,
    when a rank does not come within `timeout_s`, when ranks come to a meeting for different things,
    or when somebody calls `end`. Who waits then, or comes later, gets GroupEnded. A rank may not be
    joined again: what starts anew starts with a new Group.
    """

    def __init__(self, ranks: int, slot_numbers: int = 1 << 18, timeout_s: float = 30.0) -> None:
        """2 to 64 ranks. A meeting brings up to `slot_numbers` fp32 numbers of each, a multiple of
        16; more take several. Its memory, 8 bytes * ranks * slot_numbers, is taken now: OSError if
        there is none."""
    @staticmethod
    def open(descriptor: int) -> Group:
        """What another process made. The descriptor stays the caller's, who may close it."""
    @property
    def descriptor(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def slot_numbers(self) -> int: ...
    @property
    def why_ended(self) -> str | None:
        """None while ranks may meet."""
    def end(self) -> None:
        """For all, at once: a supervisor calls it when it sees a rank die."""

class Member:
    """One rank of a group. Its calls, and the runs of plans that have it, come one after the other,
    and in the same order on every rank."""

    def __init__(self, group: Group, rank: int) -> None:
        """ValueError if somebody has joined as this rank."""
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def group(self) -> Group: ...
    def sum(self, x: NDArray[np.float32]) -> None:
        """x, of any shape, becomes the sum of all ranks' x in the order of ranks, each sum rounded
        to fp32. Raises GroupEnded."""
    def gather(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[ranks, len(x)]: all ranks' x, all equally long. Raises GroupEnded."""

# -- plan -----------------------------------------------------------------------------------------

class Plan:
    """A flat list of operations over buffers, and the one call that runs a step through it.

    Every method that adds an operation returns its place in times(). Operations added after
    select_rows work on the selected rows.
    """

    def __init__(self, pool: Pool, isa: str, member: Member | None = None) -> None:
        """`member`: of the ranks that all_reduce and all_gather meet. Each rank's plan has as many
        of these, as wide; `run` raises GroupEnded where they cannot meet."""
    @property
    def isa(self) -> str: ...
    @property
    def num_ops(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Memory held by buffers and scratch."""
    def buffer(self, width: int) -> int:
        """A new buffer of `width` fp32 columns; its number."""
    def embed(
        self,
        out: Ref,
        weight: Weight,
        scale: float = 1.0,
        first: int = 0,
        vocabulary: int | None = None,
    ) -> int:
        """The weight's rows are tokens `first` and beyond; the others of a `vocabulary` (None:
        there are no others) become zeros."""
    def rms_norm(
        self,
        x: Ref,
        out: Ref,
        weight: NDArray[np.float32],
        eps: float,
        group: int,
        offset: float = 0.0,
    ) -> int: ...
    def linear(
        self,
        x: Ref,
        out: Ref,
        weight: Weight,
        bias: NDArray[np.float32] | None = None,
        accumulate: bool = False,
        norm: Norm | None = None,
        gated_act: Activation | None = None,
    ) -> int:
        """out = f(x) · weightᵀ (+ bias) (+ out): f normalises, or joins gate and up, or is nothing.

        x is k columns wide, with `gated_act` 2 k.
        """
    def rope_spec(self, inv_freq: NDArray[np.float32], scale: float = 1.0) -> int:
        """A table of cosines and sines that is made once per step; its number."""
    def rope(self, x: Ref, head_dim: int, spec: int) -> int: ...
    def write_kv(self, k: Ref, v: Ref, layer: int) -> int: ...
    def attention(
        self,
        q: Ref,
        out: Ref,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> int:
        """`window` and `softcap` 0: none."""
    def gated_act(self, x: Ref, out: Ref, kind: Activation) -> int: ...
    def add(self, x: Ref, y: Ref, out: Ref) -> int: ...
    def select_rows(self, x: Ref, out: Ref) -> int: ...
    def soft_cap(self, x: Ref, cap: float) -> int: ...
    def all_reduce(self, x: Ref) -> int:
        """x = the sum of all ranks' x, in the order of ranks, each sum rounded to fp32."""
    def all_gather(self, out: Ref, starts: Sequence[int]) -> int:
        """out = all ranks' parts of it side by side. `starts`: the first column of each rank's, and
        out's width."""
    def run(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        kv: KvArena | None,
        logits: Ref,
        num_ops: int | None = None,
        looks: Sequence[tuple[int, int, int, int]] = (),
        looked: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run a step, or the first `num_ops` operations of it; arrays as in backends/backend.py
        StepArrays.

        `looks`: (first, last, begin, end), whose attention is told: that of requests first ...
        last, to positions begin ... end. Each has end - begin + 1 places in `looked`, one look
        after the other: sums of weights, each rounded to a whole number of 2^-20, over all
        attention operations; then how many (row, head) pairs had weights that are no numbers.

        Returns [rows, logits.width], of the selected rows if any were selected: the buffer itself,
        which later runs leave alone for as long as the array is held.
        """
    @property
    def layers_done(self) -> tuple[int, int]:
        """How many steps have begun, and how many layers of the last one, from the first on, have
        all their KV. Any thread may ask while one runs."""
    def times(self) -> list[float]:
        """Seconds of each operation of the last run, then of everything outside them."""
    def write(self, ref: Ref, values: NDArray[np.float32]) -> None:
        """Fill some columns before a run of as many rows: to run one operation alone."""
    def read(self, ref: Ref) -> NDArray[np.float32]:
        """A copy of some columns after a run."""

# -- what this machine gives ----------------------------------------------------------------------

def read_bandwidth(pool: Pool, num_bytes: int = 1 << 28, repeats: int = 8) -> float:
    """Bytes per second that all threads of the pool read together, best of `repeats`."""

def fp32_peak(pool: Pool, isa: str) -> float:
    """fp32 operations per second (a fused multiply-add is two) of all threads together."""

def int8_peak(pool: Pool, isa: str) -> float:
    """int8 multiply-add operations per second (two each) by the set's own instructions."""

def bf16_peak(pool: Pool, isa: str) -> float:
    """The same in bf16; fp32_peak where the set has no instruction for it."""

# -- sampling: the twins are in src/duetto/runner/gumbel.py and candidates.py ---------------------

def finite_argmax(row: NDArray[np.float32], isa: str | None = None) -> int:
    """The first of the largest; -1 if one is NaN or +inf, or all are -inf."""

def draw_row(
    row: NDArray[np.float32], best: int, temperature: float, key: int, isa: str | None = None
) -> int:
    """Gumbel-max over all logits, of which row[best] is the largest."""

def draw_scaled(scaled: NDArray[np.float64], ids: NDArray[np.int64] | None, key: int) -> int:
    """Gumbel-max over some tokens' (logit - largest) / temperature; ids None: 0, 1, ..."""

def draw_filtered(
    row: NDArray[np.float32],
    first: tuple[float, int],
    changed_ids: NDArray[np.int64] | None,
    changed: NDArray[np.float64] | None,
    temperature: float,
    top_k: int,
    lowest: float,
    top_p: float,
    key: int,
    isa: str | None = None,
) -> int:
    """Gumbel-max over the tokens that top_k (0: all), a least logit (min_p) and top_p leave.

    Changed logits are -inf in the row. `first`: the largest logit of both, and its lowest id.
    """

def philox(counter: int, key_low: int, key_high: int) -> int:
    """First word of Philox4x64-10 of the counter."""

def gumbel_noise(key: int, token_id: int) -> float:
    """-log(-log(u)), u in (0, 1) a hash of both."""
