"""Rewrite that computes each rounding to a whole number once.

A compiler may compute a `floor` again for each of its uses, in loops that round its
operand differently. Near a whole number, one use then sees that number and another its
neighbor. TensorFlow's bilinear resizing, say, takes its pixels from one and their
weights from the other.
"""

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites.editing import Editor, Instruction, edit_module

_ROUNDING = ("ceil", "floor", "round-nearest-afz", "round-nearest-even")


def compute_rounding_once(module: HloModuleProto) -> bool:
    """Makes every rounding to whole numbers be computed once for all uses.

    Args:
        module: A lowered step. It is changed in place.

    Returns:
        Whether it was changed.
    """
    return bool(edit_module(module, _behind_barrier))


def _behind_barrier(editor: Editor, old: Instruction) -> Instruction | None:
    if old.opcode not in _ROUNDING:
        return None
    new = editor.copy(old, editor.operands(old), old.shape)
    return editor.emit("opt-barrier", old.shape, [new])
