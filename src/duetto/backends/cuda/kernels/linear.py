"""Projections: out = x · weightᵀ, with the weight in any format, and what follows in one kernel.

The weight is the M side of the matrix instruction and tokens are its N side; each program walks K
whole, in order. So a number's bits depend on its row and its weight only, not on how many rows
there are. Quantized weights are widened, which is exact, and multiplied group by group: a group's
sum in fp32, times its scale, is added to the total.

The product (with its bias) is rounded to out's dtype first. What follows works on rounded numbers,
as separate kernels would.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from duetto.backends.cuda.formats import GpuFormatName
from duetto.backends.cuda.kernels.activations import activate, activate_twin
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import UNIT, LinearTile, linear_tile, linear_tiles
from duetto.program.ops import Activation

# A small whole number in the low bits of this, as bits of fp32, is 2^23 more than it is.
_FLOAT_BITS = tl.constexpr(0x4B000000)


@triton.jit
def widen(data, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Numbers of a weight in x's dtype. Exact."""
    if FORMAT == "fp8":
        # Through fp16 and fp32: from fp16 to bf16 a GPU has one slow operation.
        half = data.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        wide = half.to(tl.float32).to(DTYPE)
    elif FORMAT == "fp8_bits":
        # The bits of e4m3, put where fp32 has them, are the number times 2^-120, subnormals too.
        bits = (data.to(tl.int32) << 20) & -0x78100000
        wide = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    elif FORMAT == "int8":
        # The byte plus 128 + 2^23: fewer operations than a conversion.
        bits = (data.to(tl.int32) & 255) ^ 0x4B000080
        wide = (bits.to(tl.float32, bitcast=True) - 8388736.0).to(DTYPE)
    else:
        wide = data.to(DTYPE)
    return wide


@triton.jit
def widen_nibbles(data, DTYPE: tl.constexpr):
    """The low and the high halves of bytes, less 8. Exact, in as few whole-number operations as
    there can be: a GPU has half as many units for those."""
    bits = data.to(tl.int32) | _FLOAT_BITS
    both = bits.to(tl.float32, bitcast=True)  # 2^23 + 16 high + low
    without_low = (bits & -16).to(tl.float32, bitcast=True)
    low = (both - 8.0) - without_low
    high = tl.fma(without_low, 0.0625, -524296.0)
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def load_inside(at, is_inside):
    """0 outside; None: all are inside."""
    if is_inside is None:
        numbers = tl.load(at)
    else:
        numbers = tl.load(at, mask=is_inside, other=0)
    return numbers


@triton.jit
def add_product(total, w_at, is_w, scale_at, is_group, x_low, x_high, FORMAT: tl.constexpr):
    """total + w · x of one unit of K, times its scale if the format has groups."""
    w = load_inside(w_at, is_w)
    if FORMAT == "int4":
        low, high = widen_nibbles(w, x_low.dtype)
        product = tl.dot(low, x_low, input_precision="ieee")
        product = tl.dot(high, x_high, product, input_precision="ieee")
        total = total + product * load_inside(scale_at, is_group)[:, None]
    elif FORMAT == "int8":
        product = tl.dot(widen(w, x_low.dtype, FORMAT), x_low, input_precision="ieee")
        total = total + product * load_inside(scale_at, is_group)[:, None]
    else:
        total = tl.dot(widen(w, x_low.dtype, FORMAT), x_low, total, input_precision="ieee")
    return total


@triton.jit
def round_product(total, bias, scales, outputs, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """A product as it would be stored: with fp8's scales of rows, and its bias; in fp32 again."""
    if FORMAT == "fp8" or FORMAT == "fp8_bits":
        total = total * tl.load(scales + outputs)[:, None]
    if bias is not None:
        total = total + tl.load(bias + outputs)[:, None]
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def store_results(
    total, total_up, scales, bias, out, outputs, is_output, rows, is_row, num_outputs,
    out_stride, FORMAT: tl.constexpr, GATE: tl.constexpr, ACCUMULATE: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    """What follows a product [BO, BT], and its place in out [T, N]."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    total = round_product(total, bias, scales, outputs, DTYPE, FORMAT)
    if GATE is not None:
        up = round_product(total_up, bias, scales, outputs + num_outputs, DTYPE, FORMAT)
        total = activate(total, GATE) * up
    out_at = out + rows[None, :].to(tl.int64) * out_stride + outputs[:, None]
    is_stored = is_row if EVEN_N else is_row & is_output[:, None]
    if ACCUMULATE:
        total = tl.load(out_at, mask=is_stored, other=0.0).to(tl.float32) + total
    tl.store(out_at, total.to(DTYPE), mask=is_stored)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x, w, scales, bias, out, num_rows, num_outputs, num_inputs,
    x_stride, w_stride, group_stride, out_stride,
    FORMAT: tl.constexpr, GATE: tl.constexpr, ACCUMULATE: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (o, t): BO outputs of BT rows. A unit of K is a group, or BK if there are none.

    GATE: w has twice num_outputs rows, gates and then what they open: out = GATE(gate) * up."""
    IS_INT4: tl.constexpr = FORMAT == "int4"
    SPAN: tl.constexpr = UNIT // 2 if IS_INT4 else UNIT  # columns of w's data in a unit
    HAS_GROUPS: tl.constexpr = IS_INT4 or FORMAT == "int8"
    outputs = tl.program_id(0) * BO + tl.arange(0, BO)
    is_output = outputs < num_outputs
    if not EVEN_N:
        outputs = tl.minimum(outputs, num_outputs - 1)  # computed again, and not stored
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    is_row = rows[None, :] < num_rows
    column = tl.arange(0, SPAN)
    x_at = x + rows[None, :].to(tl.int64) * x_stride + column[:, None]
    w_at = w + outputs[:, None].to(tl.int64) * w_stride + column[None, :]
    up_at = w_at + tl.cast(num_outputs, tl.int64) * w_stride
    total = tl.zeros([BO, BT], tl.float32)
    total_up = tl.zeros([BO, BT], tl.float32)
    # A stage count that the loop names is for loads of scales too.
    for k in tl.range(0, num_inputs, BK, num_stages=STAGES):
        for unit in tl.static_range(BK // UNIT):
            first = k + unit * UNIT
            is_x = is_row
            is_x_high = is_row
            is_w = None
            is_group = None
            if not EVEN_K:
                is_x = is_row & (first + column < num_inputs)[:, None]
                is_x_high = is_row & (first + SPAN + column < num_inputs)[:, None]
                is_w = (first + column < num_inputs)[None, :]
                is_group = first < num_inputs
            x_low = tl.load(x_at + first, mask=is_x, other=0.0)
            x_high = x_low
            if IS_INT4:
                x_high = tl.load(x_at + first + SPAN, mask=is_x_high, other=0.0)
            w_first = first // 2 if IS_INT4 else first
            scale_at = None
            scale_up_at = None
            if HAS_GROUPS:
                scale_at = scales + outputs + first // UNIT * group_stride
                scale_up_at = scale_at + num_outputs
            total = add_product(
                total, w_at + w_first, is_w, scale_at, is_group, x_low, x_high, FORMAT
            )
            if GATE is not None:
                total_up = add_product(
                    total_up, up_at + w_first, is_w, scale_up_at, is_group, x_low, x_high, FORMAT
                )
    store_results(
        total, total_up, scales, bias, out, outputs, is_output, rows, is_row, num_outputs,
        out_stride, FORMAT, GATE, ACCUMULATE, EVEN_N,
    )  # fmt: skip


def launch_linear(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    """out [T, N] = x [T, K] · weightᵀ + bias, rounded; or out += that, if `accumulate`.

    gate: the matrix has 2 N rows, and out = act(x · gateᵀ) * (x · upᵀ). The columns of x and out
    are contiguous; bias is in fp32. The bits are those of the parts, each rounded by itself.
    """
    tile = linear_tile(
        matrix.format.kind, gate is not None, len(x), shared_memory_bytes(x.device.index)
    )
    linear_by(tile, x, matrix, out, bias=bias, accumulate=accumulate, gate=gate)


def linear_by(
    tile: LinearTile,
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    """As `launch_linear`, by a tile that is given: all give the same bits."""
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    assert matrix.shape == (num_outputs * (1 if gate is None else 2), num_inputs)
    assert not (accumulate and gate), "a gated product is not added to anything"
    assert x.stride(1) == out.stride(1) == 1
    if num_rows == 0:
        return
    kind, scales = matrix.format.kind, matrix.scales
    data = matrix.data.view(torch.int8) if kind == "fp8" else matrix.data
    grid = (triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.tokens))
    linear_kernel[grid](
        x,
        data,
        scales,
        bias,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        x.stride(0),
        data.stride(0),
        0 if scales is None else scales.stride(-1),
        out.stride(0),
        **_constexprs(
            kind, num_outputs, num_inputs, tile, accumulate, gate, has_fp8(x.device.index)
        ),
        **_options(tile),
    )


def _constexprs(
    kind: GpuFormatName,
    num_outputs: int,
    num_inputs: int,
    tile: LinearTile,
    accumulate: bool = False,
    gate: Activation | None = None,
    has_fp8: bool = True,
) -> dict[str, object]:
    return {
        "FORMAT": "fp8_bits" if kind == "fp8" and not has_fp8 else kind,
        "GATE": gate,
        "ACCUMULATE": accumulate,
        "EVEN_N": num_outputs % tile.outputs == 0,
        "EVEN_K": num_inputs % tile.inputs == 0,
        "BO": tile.outputs,
        "BT": tile.tokens,
        "BK": tile.inputs,
        "UNIT": UNIT.get(kind, tile.inputs),
        "STAGES": tile.stages,
    }


def _options(tile: LinearTile) -> dict[str, object]:
    """No contraction: whether a product and a sum become one is not left to the compiler."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}


@cache
def shared_memory_bytes(device: int | None) -> int:
    """What a program may have at most; None is the CPU's interpreter, which has no limit."""
    if device is None:
        return 1 << 30
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


@cache
def has_fp8(device: int | None) -> bool:
    """Whether it converts e4m3 by itself. The interpreter does not."""
    return device is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def linear_twin(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    product = x.float() @ widened_matrix(matrix).t()
    if bias is not None:
        product += bias
    product = product.to(out.dtype).float()
    if gate is not None:
        opened, up = product.chunk(2, dim=1)
        product = activate_twin(opened, gate) * up
    if accumulate:
        product = out.float() + product
    out.copy_(product)


def widened_matrix(matrix: Matrix) -> Tensor:
    """[N, K] in fp32: what a matrix's numbers stand for."""
    (num_outputs, num_inputs), data = matrix.shape, matrix.data
    if matrix.scales is None:
        return data.float()
    if matrix.format.kind == "fp8":
        return data.float() * matrix.scales[:, None]
    if matrix.format.kind == "int4":
        groups = data.reshape(num_outputs, -1, matrix.format.group // 2)
        data = torch.cat((groups & 15, groups >> 4), dim=2).reshape(num_outputs, -1).float() - 8
    scales = matrix.scales.repeat_interleave(matrix.format.group, dim=1)
    return data[:, :num_inputs].float() * scales[:, :num_inputs]


# Shared memory that a program may have, by compute capability.
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
_WEIGHT_TYPES: dict[GpuFormatName, str] = {
    "bfloat16": "*bf16", "float32": "*fp32", "int8": "*i8", "int4": "*u8", "fp8": "*i8"
}  # fmt: skip


def variants() -> Iterator[KernelVariant]:
    """The first and the last tile of every format, and all of bfloat16 on an H100. Sizes are
    arguments: these are for any that tiles divide."""
    for kind in _WEIGHT_TYPES:
        gates: tuple[Activation | None, ...] = (None,) if kind == "float32" else (None, "silu")
        for gate in gates:
            found: dict[LinearTile, list[int]] = {}
            for capability, shared_bytes in _SHARED_BYTES.items():
                tiles = linear_tiles(kind, gate is not None, shared_bytes)
                is_h100 = capability == 90
                for most, tile in tiles.items():
                    is_last = most == max(tiles) and (is_h100 or gate is None)
                    is_other = is_h100 and kind == "bfloat16"
                    if most == min(tiles) or is_last or is_other:
                        found.setdefault(tile, []).append(capability)
            for tile, capabilities in found.items():
                old = [c for c in capabilities if c < 89 and kind == "fp8"]
                new = [c for c in capabilities if c not in old]
                if new:
                    yield _variant(kind, gate, tile, new)
                if old:
                    yield _variant(kind, gate, tile, old, has_fp8=False)


def _variant(
    kind: GpuFormatName,
    gate: Activation | None,
    tile: LinearTile,
    capabilities: Sequence[int],
    *,
    has_fp8: bool = True,
) -> KernelVariant:
    x = "*fp32" if kind == "float32" else "*bf16"
    constexprs = _constexprs(kind, 1 << 14, 1 << 14, tile, gate is None, gate, has_fp8)
    constexprs["bias"] = None
    signature = {"x": x, "w": _WEIGHT_TYPES[kind], "scales": "*fp32", "out": x}
    if kind not in ("int8", "int4", "fp8"):
        del signature["scales"]
        constexprs["scales"] = None
    sizes = ("num_outputs", "num_inputs", "x_stride", "w_stride", "group_stride", "out_stride")
    signature |= dict.fromkeys(("num_rows", *sizes), "i32")
    shape = f"{tile.outputs} x {tile.tokens} x {tile.inputs}, {tile.stages} stages"
    name = f"{constexprs['FORMAT']} {gate or 'add'}, {shape}"
    return KernelVariant(
        name,
        linear_kernel,
        signature,
        constexprs,
        _options(tile),
        sizes,
        capabilities=tuple(capabilities),
    )
