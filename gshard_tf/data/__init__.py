"""Input: several examples in each row, with segment ids.

`PackedDataset` needs TensorFlow and is imported when it is first used; everything else
needs numpy alone.
"""

from typing import TYPE_CHECKING, Any

from gshard_tf.data.rows import LOOKAHEAD, RowPlan, lay_out, plan_rows

if TYPE_CHECKING:
    from gshard_tf.data.packed_dataset import PackedDataset

__all__ = ["LOOKAHEAD", "PackedDataset", "RowPlan", "lay_out", "plan_rows"]


def __getattr__(name: str) -> Any:
    if name != "PackedDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gshard_tf.data.packed_dataset import PackedDataset

    globals()[name] = PackedDataset
    return PackedDataset
