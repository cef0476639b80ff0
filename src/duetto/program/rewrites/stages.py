"""A program cut for pipeline parallelism: stages of whole layers, one behind the other."""

import re
from collections.abc import Sequence
from dataclasses import replace

from duetto.core.errors import ConfigError
from duetto.program.op import Op, Ref
from duetto.program.program import KVSpec, Program

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def stages(program: Program, degree: int) -> tuple[Program, ...]:
    """The operations cut into stages of whole layers, as even as can be.

    What stands before the first layer belongs to the first stage, what follows the last one to
    the last. `inputs` and `outputs` say which columns go from stage to stage. Layers keep their
    numbers; those of other stages have no KV heads. Raises ConfigError if there are fewer layers
    than stages.
    """
    num_layers = len(program.kv)
    if not 1 <= degree <= num_layers:
        raise ConfigError(
            f"--pp: {degree} stages cannot be made of {num_layers} layers; "
            f"accepted: 1 to {num_layers}"
        )
    if degree == 1:
        return (program,)
    lists: list[list[Op]] = [[] for _ in range(degree)]
    layer = 0
    for op in program.ops:
        layer = _layer_of(op, layer)
        lists[layer * degree // num_layers].append(op)
    needed = _needed(program, lists)
    return tuple(
        _stage(program, ops, needed[stage], needed[stage + 1]) for stage, ops in enumerate(lists)
    )


def _stage(
    program: Program, ops: Sequence[Op], inputs: tuple[Ref, ...], outputs: tuple[Ref, ...]
) -> Program:
    used = {name for op in ops for name in op.weights}
    layers = {op.kv.layer for op in ops if op.kv is not None}
    return replace(
        program,
        ops=tuple(ops),
        weights={name: spec for name, spec in program.weights.items() if name in used},
        kv=tuple(
            kv if layer in layers else KVSpec(0, kv.head_dim) for layer, kv in enumerate(program.kv)
        ),
        parts={name: part for name, part in program.parts.items() if name in used},
        inputs=inputs,
        outputs=outputs,
    )


def _needed(program: Program, lists: Sequence[Sequence[Op]]) -> list[tuple[Ref, ...]]:
    """What each stage and those behind it read of what those before it wrote; of none: nothing."""
    found: list[tuple[Ref, ...]] = [program.outputs]
    live = dict.fromkeys((program.logits, *program.outputs))
    for ops in reversed(lists):
        for op in reversed(ops):
            made = op.writes
            live = {ref: None for ref in live if not any(own.covers(ref) for own in made)}
            live |= dict.fromkeys(op.reads)
        found.append(tuple(live))
    return found[::-1]


def _layer_of(op: Op, current: int) -> int:
    """An operation that names no layer belongs to the one before it."""
    if op.kv is not None:
        return op.kv.layer
    for name in op.weights:
        if match := _LAYER.search(name):
            return int(match[1])
    return current
