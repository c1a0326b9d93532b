"""The messages of TensorFlow's eager service, as far as a stand-in host needs them.

The wheel has no Python classes for `eager_service.proto`, and of `worker.proto` only
`RecvTensor` is needed; field numbers are those of TensorFlow 2.20. Unknown fields are
kept by protocol buffers and ignored here.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# What the messages refer to must be in the pool.
from tensorflow.core.framework import (  # noqa: F401
    attr_value_pb2,
    device_attributes_pb2,
    function_pb2,
    tensor_pb2,
    tensor_shape_pb2,
    types_pb2,
)
from tensorflow.core.protobuf import tensorflow_server_pb2  # noqa: F401

_TENSORFLOW = "tensorflow/core/{}.proto"
_IMPORTS = [
    "framework/attr_value",
    "framework/device_attributes",
    "framework/function",
    "framework/tensor",
    "framework/tensor_shape",
    "framework/types",
    "protobuf/tensorflow_server",
]
_NUMBERS = {"int64": 3, "int32": 5, "fixed64": 6, "bool": 8, "string": 9, "bytes": 12}

# message -> "number name type"; a * after the type: repeated; a capital letter: one of
# these messages; a dot: one of TensorFlow's.
_MESSAGES = {
    "Empty": [],
    "RemoteTensorHandle": ["1 op_id int64", "2 output_num int32"],
    "Input": ["1 remote_handle RemoteTensorHandle", "2 tensor .TensorProto"],
    "Attr": ["1 key string", "2 value .AttrValue"],
    "Operation": [
        "1 id int64",
        "2 name string",
        "5 attrs Attr*",
        "6 device string",
        "7 is_component_function bool",
        "9 is_function bool",
        "10 op_inputs Input*",
    ],
    "SendTensorOp": ["1 op_id int64", "2 tensors .TensorProto*"],
    "RegisterFunctionOp": [
        "1 function_def .FunctionDef",
        "2 is_component_function bool",
        "3 library .FunctionDefLibrary",
    ],
    "QueueItem": [
        "1 handle_to_decref RemoteTensorHandle",
        "2 operation Operation",
        "3 send_tensor SendTensorOp",
        "4 register_function RegisterFunctionOp",
    ],
    "QueueResponse": [
        "1 shape .TensorShapeProto*",
        "2 tensor .TensorProto*",
        "3 device string*",
    ],
    "CreateContextRequest": ["1 server_def .ServerDef"],
    "CreateContextResponse": ["2 device_attributes .DeviceAttributes*"],
    "GetStatusResponse": ["1 device_attributes .DeviceAttributes*"],
    "EnqueueRequest": ["1 context_id fixed64", "3 queue QueueItem*"],
    "EnqueueResponse": ["1 queue_response QueueResponse*"],
    "RunComponentFunctionRequest": [
        "1 context_id fixed64",
        "2 operation Operation",
        "3 output_num int32*",
    ],
    "RunComponentFunctionResponse": [
        "1 shape .TensorShapeProto*",
        "2 tensor .TensorProto*",
    ],
    "RecvTensorRequest": ["1 step_id int64", "2 rendezvous_key string"],
    "RecvTensorResponse": ["1 tensor .TensorProto"],
    # What the compile operation carries: tpu/compile_metadata.proto.
    "CompileArg": [
        "1 dtype int32",
        "2 shape .TensorShapeProto",
        "3 kind int32",
        "4 sharding OpSharding",
    ],
    "CompileRetval": ["1 sharding OpSharding"],
    "OpSharding": [
        "1 type int32",
        "3 tile_assignment_dimensions int64*",
        "4 tile_assignment_devices int64*",
        "6 replicate_on_last_tile_dim bool",
    ],
    "CompileMetadata": [
        "1 args CompileArg*",
        "2 retvals CompileRetval*",
        "3 num_replicas int32",
        "4 num_cores_per_replica int32",
        "8 device_assignment bytes",
        "15 use_spmd_for_xla_partitioning bool",
    ],
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="stand_in.proto", package="stand_in", syntax="proto3"
    )
    file.dependency.extend(_TENSORFLOW.format(name) for name in _IMPORTS)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields:
            number, field_name, kind = text.split()
            repeated, kind = kind.endswith("*"), kind.rstrip("*")
            field = message.field.add(
                name=field_name, number=int(number), label=3 if repeated else 1
            )
            if kind in _NUMBERS:
                field.type = _NUMBERS[kind]
            else:
                field.type = 11  # a message
                package = ".tensorflow" if kind.startswith(".") else ".stand_in."
                field.type_name = package + kind
    return file


descriptor_pool.Default().AddSerializedFile(_file().SerializeToString())


def message(name: str):
    """The class of a message."""
    pool = descriptor_pool.Default()
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"stand_in.{name}")
    )
