"""Rewrite of paddings between elements, along dimensions that have one element.

Fault: where such a dimension is padded to one that is split, the partitioner puts the
element on every device. The gradient of a slice with strides is such a padding. Seen
with jaxlib 0.10 and 0.12, not with 0.9.

Replacement: no padding between elements, which has no effect there.
"""

from gshard_tf.compat.xla_protos import HloModuleProto


def drop(module: HloModuleProto) -> int:
    """Drops these paddings, in place; returns the number of instructions."""
    dropped = 0
    for computation in module.computations:
        sizes = {each.id: each.shape.dimensions for each in computation.instructions}
        for instruction in computation.instructions:
            if instruction.opcode != "pad":
                continue
            gaps = [
                dimension
                for dimension, size in zip(
                    instruction.padding_config.dimensions,
                    sizes[instruction.operand_ids[0]],
                    strict=True,
                )
                if dimension.interior_padding and size == 1
            ]
            for dimension in gaps:
                dimension.interior_padding = 0
            dropped += bool(gaps)
    return dropped
