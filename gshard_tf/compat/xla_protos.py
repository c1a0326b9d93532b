"""XLA's protocol buffers as TensorFlow carries them: HLO modules, shapes, shardings.

Relies on: `tensorflow.compiler.xla.xla_data_pb2` and `.service.hlo_pb2`, the messages
that TensorFlow's own compiler writes and jaxlib's compiler reads. On an upgrade, watch:
the modules move between packages, a field that the rewrites set may be renamed, and so
may `input_output_alias`, `host_program_shape` and `metadata.op_name`.
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
