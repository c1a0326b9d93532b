"""FLOPs of the dots, convolutions and kernels of an HLO module."""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from gshard_tf.hlo.parser import Instruction, Module, called

# Of the configuration of a Pallas kernel.
_STATED = re.compile(r'"cost_estimate"[^}]*?"flops"[": ]+(\d+)')


def flops_by_operation(
    module: Module, loops: Mapping[str, int | None] | None = None
) -> dict[str, float]:
    """Returns the FLOPs of a module's dots, convolutions and kernels by `op_name`.

    Args:
        module: The module.
        loops: How often its loops turn; see `Module.executed`. The content of a loop
            without a known number counts once.
    """
    totals: dict[str, float] = {}
    for instruction, computation, times in module.executed(loops):
        flops = instruction_flops(instruction, computation)
        if flops:
            name = instruction.op_name
            totals[name] = (
                totals.get(name, 0.0) + (1 if times is None else times) * flops
            )
    return totals


def flops_of_a_device(
    module: Module, devices: int, loops: Mapping[str, int | None] | None = None
) -> float:
    """Returns a device's share of a module that is not partitioned yet.

    Args:
        module: The module. Its shapes are whole, except in manual regions, which are
            written for one device.
        devices: The number of devices.
        loops: See `flops_by_operation`.
    """
    manual = _manual_computations(module)
    total = 0.0
    for instruction, computation, times in module.executed(loops):
        flops = instruction_flops(instruction, computation)
        if flops:
            share = 1 if id(computation) in manual else 1 / devices
            total += (1 if times is None else times) * flops * share
    return total


def _manual_computations(module: Module) -> set[int]:
    """Returns the identities of the computations that run on a device's parts.

    `jax.shard_map` calls one with operands that `SPMDFullToShardShape` makes.
    """
    names: list[str] = []
    for computation in module.computations.values():
        for instruction in computation.values():
            operands = [computation.get(name) for name in instruction.operands]
            if instruction.opcode == "call" and any(
                operand is not None and _TO_PARTS in operand.attributes
                for operand in operands
            ):
                names += called(instruction)
    for name in names:  # grows on the way
        for instruction in module.computations[name].values():
            names += [each for each in called(instruction) if each not in names]
    return {id(module.computations[name]) for name in names}


_TO_PARTS = 'custom_call_target="SPMDFullToShardShape"'


def instruction_flops(
    instruction: Instruction, computation: dict[str, Instruction]
) -> int:
    """FLOPs of a dot or a convolution, two per multiplication; 0 for all else.

    A Pallas kernel states its own.
    The TPU compiler turns dots into convolutions, with batch dimensions as spatial
    ones that are mostly padding; only positions inside the operands count.
    """
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0].dims
        depth = math.prod(
            left[d] for d in _dims(instruction.attributes, "lhs_contracting_dims")
        )
        return 2 * instruction.arrays[0].elements * depth
    if instruction.opcode == "convolution":
        image, kernel = (
            computation[name].arrays[0].dims for name in instruction.operands[:2]
        )
        return _convolution_flops(
            image, kernel, instruction.arrays[0].dims, instruction.attributes
        )
    if instruction.opcode == "custom-call":
        stated = _STATED.search(instruction.attributes)
        return int(stated[1]) if stated else 0
    return 0


def _dims(attributes: str, name: str) -> list[int]:
    match = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(d) for d in match[1].split(",") if d] if match else []


def _convolution_flops(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(
            f"A convolution must have dim_labels. Received: {attributes!r}"
        )
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=", 1) for f in window[1].split()) if window else {}
    batch_groups = re.search(r"batch_group_count=(\d+)", attributes)
    flops = 2 * right[of_right.index("i")] * out[of_out.index("f")]
    flops *= left[of_left.index("b")] // (int(batch_groups[1]) if batch_groups else 1)
    for d in range(len(right) - 2):
        low = fields["pad"].split("x")[d].split("_")[0] if "pad" in fields else "0"
        numbers = [
            int(fields[name].split("x")[d]) if name in fields else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        ]
        flops *= _valid_positions(
            left[of_left.index(str(d))],
            right[of_right.index(str(d))],
            out[of_out.index(str(d))],
            int(low),
            *numbers,
        )
    return flops


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    left: int, right: int, out: int, low: int, stride: int, dilate: int, spread: int
) -> int:
    """Returns how many pairs (output, kernel position) meet an element."""
    total = 0
    kernel = np.arange(right) * spread
    for position in range(out):
        at = position * stride - low + kernel
        inside = (at >= 0) & (at % dilate == 0) & (at // dilate < left)
        total += int(np.count_nonzero(inside))
    return total
