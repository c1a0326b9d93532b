"""Memory per core of a program that fits or does not, and suggestions."""

import re
from collections.abc import Sequence

from tensorflow.experimental import dtensor

from gshard_tf.hlo import layer_names, parser
from gshard_tf.planning.records import Buffer, Memory, OutOfMemory, Weight
from gshard_tf.spmd.program import SpmdProgram

_NO_NEW_BUFFER = {
    "bitcast",
    "constant",
    "copy",
    "get-tuple-element",
    "parameter",
    "reshape",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_of(program: SpmdProgram, capacity: float | None) -> Memory:
    """Returns the memory that a compiled program needs per core."""
    analysis = program.compiled.memory_analysis()
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        # An output that reuses the memory of a donated argument needs none of its own.
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        capacity=capacity,
    )


def out_of_memory(
    message: str, capacity: float | None, layers: layer_names.LayerNames
) -> OutOfMemory | None:
    """Parses the compiler's error for a program that does not fit; None for others."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if used:
        needed, available = _size(used[1], used[2]), _size(used[3], used[4])
    else:
        lone = re.search(
            r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
            message,
        )
        if lone is None:
            return None
        needed, available = _size(lone[1], lone[2]), _size(lone[3], lone[4])
    buffers = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", block)
        if size is None:
            continue
        shape = re.search(r"Shape: (\S+?)(?:\{|\s|$)", block)
        op_name = re.search(r'op_name="([^"]*)"', block)
        name = op_name[1] if op_name else ""
        buffers.append(
            Buffer(
                bytes=int(_size(size[1], size[2])),
                shape=shape[1] if shape else "",
                layer=layers.layer_of(name),
                operation=layer_names.operation_of(name),
            )
        )
    return OutOfMemory(needed, available or capacity or 0.0, buffers, message)


def largest_as_written(
    module: parser.Module, layers: layer_names.LayerNames, count: int = 8
) -> list[Buffer]:
    """Returns the largest tensors that a step makes, one of each shape and layer."""
    buffers: dict[tuple[str, str], Buffer] = {}
    for instruction, _, _ in module.executed():
        # An array of its own, neither an argument nor one that is passed on.
        if len(instruction.arrays) != 1 or instruction.opcode in _NO_NEW_BUFFER:
            continue
        (array,) = instruction.arrays
        shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
        layer = layers.layer_of(instruction.op_name)
        operation = layer_names.operation_of(instruction.op_name)
        buffers.setdefault((shape, layer), Buffer(array.bytes, shape, layer, operation))
    return sorted(buffers.values(), key=lambda b: -b.bytes)[:count]


def _size(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def advice_for(
    weights: Sequence[Weight],
    memory: Memory | None,
    oom: OutOfMemory | None,
    capacity: float | None,
    mesh: dtensor.Mesh,
) -> list[str]:
    """Returns suggestions for a step that does not fit, or barely."""
    if memory is not None:
        needed: float = memory.total
    elif oom is not None:
        needed = oom.needed
    else:
        return []
    if capacity is None or (memory is not None and memory.total < 0.9 * capacity):
        return []
    state = sum(w.bytes_per_core for w in weights)
    whole = [w for w in weights if w.bytes_per_core == w.bytes and w.bytes > 2**20]
    whole.sort(key=lambda w: -w.bytes)
    axes = ", ".join(mesh.dim_names)
    suggestions = []
    if state > 0.4 * capacity:
        suggestions.append(
            f"The state alone takes {state / 1e9:.1f} of {capacity / 1e9:.1f} GB a "
            "core."
        )
        if whole:
            listed = ", ".join(w.path for w in whole[:3])
            suggestions.append(
                f"Every core holds all of {len(whole)} large variables ({listed}): "
                f"split them over an axis of the mesh ({axes}) by AxisRules, or all "
                "at once by AxisRules(..., fsdp='axis')."
            )
        else:
            suggestions.append(
                "All large variables are split already: take more cores, and make the "
                "axis longer that splits them."
            )
    if needed - state > 0.3 * capacity:
        suggestions += [
            "Activations take most of the rest: compute them again in the backward "
            "pass (remat='attention' or remat=True of Transformer and its blocks).",
            "Halve them by bfloat16: keras.config.set_dtype_policy('mixed_bfloat16') "
            "keeps the weights in float32.",
            "Take more cores on the axis that splits the batch, or a smaller batch.",
            "With dispatcher='einsum', or if the largest buffers are of a router: "
            "smaller groups (group_size of MoELayer), or dispatcher='index'.",
        ]
    return suggestions
