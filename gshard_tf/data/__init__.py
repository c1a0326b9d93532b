"""Input: several examples in each row, with segment ids."""

from gshard_tf.data.packed_dataset import PackedDataset
from gshard_tf.data.rows import LOOKAHEAD, RowPlan, lay_out, plan_rows

__all__ = ["LOOKAHEAD", "PackedDataset", "RowPlan", "lay_out", "plan_rows"]
