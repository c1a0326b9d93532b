"""Protocol buffers of XLA, as TensorFlow ships them.

Relies on: `tensorflow.compiler.xla`, whose messages have no public name. On an upgrade,
watch: that these modules still exist, and the fields `input_output_alias`,
`host_program_shape` and `metadata.op_name`.
"""

from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

__all__ = ["hlo_pb2", "xla_data_pb2"]
