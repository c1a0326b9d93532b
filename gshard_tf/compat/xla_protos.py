"""XLA's protocol buffers as TensorFlow ships them: HLO modules, shapes, shardings.

Relies on: `tensorflow.compiler.xla`, whose messages have no public name. jaxlib's
compiler reads the same messages. On an upgrade, watch: that these modules still exist,
and the fields that the rewrites set, such as `input_output_alias`, `host_program_shape`
and `metadata.op_name`.
"""

from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.compiler.xla.service.hlo_pb2 import (
    HloComputationProto,
    HloInstructionProto,
    HloModuleProto,
)
from tensorflow.compiler.xla.xla_data_pb2 import (
    LiteralProto,
    OpSharding,
    ProgramShapeProto,
    ShapeProto,
)

__all__ = [
    "HloComputationProto",
    "HloInstructionProto",
    "HloModuleProto",
    "LiteralProto",
    "OpSharding",
    "ProgramShapeProto",
    "ShapeProto",
    "hlo_pb2",
    "xla_data_pb2",
]
