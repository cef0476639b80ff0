"""Projections of rows in int8 by weights in int8, as the CPU multiplies by them.

A group's product is a whole number, and exact; in fp32, times the scale of the weight's group and
of the row's, it is added to the total, group after group. No format asks for it yet: whether it is
faster than linear.py's is for a GPU to say.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.activations import activate_twin
from duetto.backends.cuda.kernels.linear import load_inside, shared_memory_bytes, store_results
from duetto.backends.cuda.kernels.quantize_rows import ROW_GROUP
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import LinearTile, byte_tile
from duetto.program.ops import Activation


@triton.jit
def add_whole_product(total, w_at, is_w, scale_at, x, x_scale):
    """total + one group's product, times both scales."""
    product = tl.dot(load_inside(w_at, is_w), x, out_dtype=tl.int32).to(tl.float32)
    return total + product * (tl.load(scale_at)[:, None] * x_scale[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def linear_w8a8_kernel(
    x, x_scales, w, scales, bias, out, num_rows, num_outputs, num_inputs,
    x_stride, x_scale_stride, w_stride, group_stride, out_stride,
    GATE: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BO: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As linear_kernel, group by group."""
    outputs = tl.program_id(0) * BO + tl.arange(0, BO)
    is_output = outputs < num_outputs
    if not EVEN_N:
        outputs = tl.minimum(outputs, num_outputs - 1)  # computed again, and not stored
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    is_row = rows[None, :] < num_rows
    column = tl.arange(0, GROUP)
    x_at = x + rows[None, :].to(tl.int64) * x_stride + column[:, None]
    x_scale_at = x_scales + rows.to(tl.int64) * x_scale_stride
    w_at = w + outputs[:, None].to(tl.int64) * w_stride + column[None, :]
    up_at = w_at + tl.cast(num_outputs, tl.int64) * w_stride
    total = tl.zeros([BO, BT], tl.float32)
    total_up = tl.zeros([BO, BT], tl.float32)
    for first in tl.range(0, num_inputs, GROUP, num_stages=STAGES):
        is_x = is_row
        is_w = None
        if not EVEN_K:
            is_x = is_row & (first + column < num_inputs)[:, None]
            is_w = (first + column < num_inputs)[None, :]
        numbers = tl.load(x_at + first, mask=is_x, other=0)
        x_scale = tl.load(x_scale_at + first // GROUP, mask=rows < num_rows, other=0.0)
        scale_at = scales + outputs + first // GROUP * group_stride
        total = add_whole_product(total, w_at + first, is_w, scale_at, numbers, x_scale)
        if GATE is not None:
            total_up = add_whole_product(
                total_up, up_at + first, is_w, scale_at + num_outputs, numbers, x_scale
            )
    store_results(
        total, total_up, scales, bias, out, outputs, is_output, rows, is_row, num_outputs,
        out_stride, "int8", GATE, ACCUMULATE, EVEN_N,
    )  # fmt: skip


def launch_linear_w8a8(
    x: Tensor,
    x_scales: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    """As launch_linear, of what quantize_rows made of x."""
    (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
    assert matrix.scales is not None and matrix.format.group == ROW_GROUP
    assert matrix.shape == (num_outputs * (1 if gate is None else 2), num_inputs)
    assert not (accumulate and gate), "a gated product is not added to anything"
    if num_rows == 0:
        return
    tile = byte_tile(gate is not None, num_rows, shared_memory_bytes(x.device.index))
    grid = (triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.tokens))
    linear_w8a8_kernel[grid](
        x,
        x_scales,
        matrix.data,
        matrix.scales,
        bias,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        x.stride(0),
        x_scales.stride(0),
        matrix.data.stride(0),
        matrix.scales.stride(1),
        out.stride(0),
        **_constexprs(tile, num_outputs, num_inputs, accumulate, gate),
        **_options(tile),
    )


def _constexprs(
    tile: LinearTile,
    num_outputs: int,
    num_inputs: int,
    accumulate: bool,
    gate: Activation | None,
) -> dict[str, object]:
    return {
        "GATE": gate,
        "ACCUMULATE": accumulate,
        "EVEN_N": num_outputs % tile.outputs == 0,
        "EVEN_K": num_inputs % ROW_GROUP == 0,
        "BO": tile.outputs,
        "BT": tile.tokens,
        "GROUP": ROW_GROUP,
        "STAGES": tile.stages,
    }


def _options(tile: LinearTile) -> dict[str, object]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}


def linear_w8a8_twin(
    x: Tensor,
    x_scales: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    assert matrix.scales is not None
    product = torch.zeros(len(x), matrix.shape[0], device=x.device)
    for group, numbers in enumerate(x.split(ROW_GROUP, dim=1)):
        weight = matrix.data[:, group * ROW_GROUP : (group + 1) * ROW_GROUP]
        whole = numbers.double() @ weight.double().t()  # exact
        product += whole.float() * (matrix.scales[:, group] * x_scales[:, group, None])
    if bias is not None:
        product += bias
    product = product.to(out.dtype).float()
    if gate is not None:
        opened, up = product.chunk(2, dim=1)
        product = activate_twin(opened, gate) * up
    out.copy_(out.float() + product if accumulate else product)


def variants() -> Iterator[KernelVariant]:
    """For few rows and for many, of sizes that tiles divide; as an H100's memory takes them."""
    sizes = ("num_outputs", "num_inputs", "x_stride", "w_stride", "group_stride", "out_stride")
    pointers = {"x": "*i8", "x_scales": "*fp32", "w": "*i8", "scales": "*fp32", "out": "*bf16"}
    signature = {**pointers, **dict.fromkeys((*sizes, "num_rows", "x_scale_stride"), "i32")}
    for rows in (1, 2048):
        for gate in (None, "silu"):
            tile = byte_tile(gate is not None, rows, 227 << 10)
            constants = _constexprs(tile, 1 << 14, 1 << 14, False, gate) | {"bias": None}
            name = f"{gate or 'store'}, {tile.outputs} x {tile.tokens}, {tile.stages} stages"
            yield KernelVariant(
                name, linear_w8a8_kernel, signature, constants, _options(tile), sizes,
                capabilities=(90,),
            )  # fmt: skip
