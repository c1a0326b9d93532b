"""Rewrite of products whose first operand XLA's CPU compiler would copy transposed.

The gradient of a weight is a product that contracts the first dimensions, the positions
of the batch, of both operands. On a CPU, XLA transposes the first operand of such a
product. For a table of the vocabulary that is the gradient of all logits, the largest
tensor of the step.
"""

from typing import Any

import numpy as np

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites.editing import (
    Editor,
    Instruction,
    array_shape,
    edit_module,
)


def fast_on_cpu(hlo: bytes) -> bytes:
    """Returns a module of the same values, whose weight gradients copy less on a CPU.

    In products that contract positions the narrower operand comes first.

    Args:
        hlo: A serialized `HloModuleProto`.
    """
    module = HloModuleProto.FromString(hlo)
    return module.SerializeToString() if edit_module(module, _swapped) else hlo


def _swapped(editor: Editor, old: Instruction) -> Instruction | None:
    if old.opcode != "dot":
        return None
    numbers = old.dot_dimension_numbers
    positions = list(range(len(numbers.lhs_contracting_dimensions)))
    if (
        not positions
        # Swapped, the compiler drops the names of products for each expert.
        or numbers.lhs_batch_dimensions
        or list(numbers.lhs_contracting_dimensions) != positions
        or list(numbers.rhs_contracting_dimensions) != positions
    ):
        return None
    first, second = editor.operands(old)
    wide = list(first.shape.dimensions[len(positions) :])
    narrow = list(second.shape.dimensions[len(positions) :])
    if np.prod(wide) <= np.prod(narrow):
        return None
    product = editor.copy(
        old, [second, first], array_shape(old.shape.element_type, [*narrow, *wide])
    )
    product.ClearField("sharding")
    # Else the two would be simplified to what they were.
    kept = editor.emit("opt-barrier", product.shape, [product])
    rank = len(narrow) + len(wide)
    fields: dict[str, Any] = {
        "dimensions": [*range(len(narrow), rank), *range(len(narrow))]
    }
    if old.HasField("sharding"):
        fields["sharding"] = old.sharding
    return editor.emit("transpose", old.shape, [kept], **fields)
