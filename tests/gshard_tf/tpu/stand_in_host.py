"""A process that says that it is a TPU host, and writes down what it is asked to do.

    python stand_in_host.py TOPOLOGY FOLDER

TOPOLOGY is that of its slice, serialised, in hexadecimal digits. It prints the port
that it listens on. Operations on its CPU and its "TPU cores" run in its own
TensorFlow, on the CPU, so variables live and are read back; functions are not run:
they return zeros, the one that initialises the system its topology; one that only
copies a value to the client does. What arrives is left in FOLDER: `log.txt`, a line per
request, and each function that is registered as `function_N.pb`.
"""

import os
import sys
import threading
import time
import traceback
from concurrent import futures

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import grpc
import tensorflow as tf
from eager_service import message
from tensorflow.core.framework import device_attributes_pb2
from tensorflow.python.eager import context, execute
from tensorflow.python.framework import op_def_registry
from tensorflow.python.tpu import topology as tpu_topology

# For what another request is about to bring; what a function would have sent does
# not come.
WAIT_SECONDS = 3


class StandInHost:
    """Answers the requests of TensorFlow's eager client."""

    def __init__(self, topology, folder):
        read = tpu_topology.Topology(serialized=topology)
        self.cores = read.num_tasks * read.num_tpus_per_task
        self.topology = tf.make_tensor_proto(topology)
        self.folder = folder
        self.log = open(os.path.join(folder, "log.txt"), "w", buffering=1)  # noqa: SIM115
        self.values = {}  # (operation, output) -> tensor
        self.functions = {}  # name -> number of outputs
        self.sends = {}  # name -> rendezvous names of what the function sends
        self.sent = {}  # rendezvous name -> tensor
        self.arrived = threading.Condition()

    def note(self, *words):
        print(*words, sep="\t", file=self.log)

    # -- requests ----------------------------------------------------------------

    def devices(self):
        kinds = [("CPU", 1), ("TPU_SYSTEM", 1), ("TPU", self.cores)]
        return [
            device_attributes_pb2.DeviceAttributes(
                name=f"/job:worker/replica:0/task:0/device:{kind}:{i}",
                device_type=kind,
                memory_limit=1 << 34,
                incarnation=1000 + 100 * len(kind) + i,
            )
            for kind, count in kinds
            for i in range(count)
        ]

    def GetStatus(self, request, unused):
        return message("GetStatusResponse")(device_attributes=self.devices())

    def CreateContext(self, request, unused):
        return message("CreateContextResponse")(device_attributes=self.devices())

    def Enqueue(self, request, unused):
        answers = [self._handle(item) for item in request.queue]
        return message("EnqueueResponse")(queue_response=answers)

    def StreamingEnqueue(self, requests, unused):
        for request in requests:
            yield self.Enqueue(request, unused)

    def RunComponentFunction(self, request, unused):
        operation = request.operation
        self.note(
            "run",
            operation.name,
            operation.device,
            *(str(self._name(each)) for each in operation.op_inputs),
        )
        self._pass_on(operation)
        answer = message("RunComponentFunctionResponse")()
        for _ in request.output_num:
            answer.tensor.append(self._zero(operation.name))
        return answer

    def RecvTensor(self, request, unused):
        name = request.rendezvous_key.split(";")[3]
        with self.arrived:
            self.arrived.wait_for(lambda: name in self.sent, WAIT_SECONDS)
            self.note("receive", name, name in self.sent)
            value = self.sent.pop(name, tf.constant(0.0))
        return message("RecvTensorResponse")(tensor=tf.make_tensor_proto(value.numpy()))

    def _pass_on(self, operation):
        """Result of a function that only copies a variable's value to the client."""
        if not operation.name.startswith("__wrapped__Identity"):
            return
        [given] = operation.op_inputs
        with self.arrived:
            for name in self.sends[operation.name]:
                self.sent[name] = self._value(given)
            self.arrived.notify_all()

    def _zero(self, function):
        return self.topology if "tpu_init" in function else tf.make_tensor_proto(0.0)

    # -- items of a queue --------------------------------------------------------

    def _handle(self, item):
        answer = message("QueueResponse")()
        if item.HasField("operation"):
            operation = item.operation
            try:
                outputs = self._run(operation)
            except Exception:
                self.note("error", operation.name, repr(traceback.format_exc()[-800:]))
                raise
            for i, output in enumerate(outputs):
                self.values[operation.id, i] = output
                answer.shape.append(tf.TensorShape(output.shape).as_proto())
                if operation.name in self.functions:
                    answer.device.append(operation.device)
        elif item.HasField("register_function"):
            function = item.register_function.function_def
            self.functions[function.signature.name] = len(function.signature.output_arg)
            self.sends[function.signature.name] = [
                node.attr["tensor_name"].s.decode()
                for node in function.node_def
                if node.op == "_Send"
            ]
            path = f"function_{len(self.functions):03d}.pb"
            with open(os.path.join(self.folder, path), "wb") as file:
                file.write(function.SerializeToString())
            self.note("function", function.signature.name, path)
        elif item.HasField("send_tensor"):
            sent = item.send_tensor
            for i, tensor in enumerate(sent.tensors):
                self.values[sent.op_id, i] = _decoded(tensor)
            answer.shape.append(self.values[sent.op_id, 0].shape.as_proto())
        return answer

    def _run(self, operation):
        attributes = {each.key: each.value for each in operation.attrs}
        inputs = [self._value(each) for each in operation.op_inputs]
        self.note("operation", operation.name, operation.device, operation.id)
        if operation.name in self.functions:
            self.note("call", operation.name, operation.device)
            zero = tf.constant(tf.make_ndarray(self._zero(operation.name)).item())
            return [zero] * self.functions[operation.name]
        if operation.name == "_Send":
            with self.arrived:
                self.sent[attributes["tensor_name"].s.decode()] = inputs[0]
                self.arrived.notify_all()
            return []
        if operation.name == "_Recv":
            return [self.sent[attributes["tensor_name"].s.decode()]]
        definition = op_def_registry.get(operation.name)
        for attribute in definition.attr:
            if attribute.name not in attributes and attribute.HasField("default_value"):
                attributes[attribute.name] = attribute.default_value
        with tf.device("/CPU:0"):
            outputs = execute.execute(
                operation.name.encode(),
                _count_outputs(definition, attributes),
                inputs,
                _flat(attributes),
                context.context(),
            )
        if outputs is None:
            return []
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    def _value(self, given):
        if given.HasField("tensor"):
            return _decoded(given.tensor)
        return self.values[self._name(given)]

    def _name(self, given):
        handle = given.remote_handle
        return (handle.op_id, handle.output_num)


def _decoded(proto):
    # Not `make_ndarray`, which cannot read strings as TensorFlow's C++ writes them.
    with tf.device("/CPU:0"):
        return tf.io.parse_tensor(proto.SerializeToString(), tf.as_dtype(proto.dtype))


def _count_outputs(definition, attributes):
    count = 0
    for output in definition.output_arg:
        if output.number_attr:
            count += attributes[output.number_attr].i
        elif output.type_list_attr:
            count += len(attributes[output.type_list_attr].list.type)
        else:
            count += 1
    return count


def _dims(shape):
    return None if shape.unknown_rank else [d.size for d in shape.dim]


def _flat(attributes):
    """Attributes as `execute` takes them: name, value, name, value, ..."""
    flat = []
    for name, value in attributes.items():
        kind = value.WhichOneof("value")
        if name.startswith("_") or kind is None:
            continue
        if kind == "shape":
            plain = _dims(value.shape)
        elif kind == "list":
            listed = [
                getattr(value.list, field)
                for field in ("s", "i", "f", "b", "type", "shape")
                if len(getattr(value.list, field))
            ]
            plain = list(listed[0]) if listed else []
            if value.list.shape:
                plain = [_dims(shape) for shape in value.list.shape]
        else:
            plain = getattr(value, kind)
        flat += [name, plain]
    return tuple(flat)


class _Service(grpc.GenericRpcHandler):
    """Finds the method of the host that a call names."""

    def __init__(self, host):
        self.host = host

    def service(self, details):
        name = details.method.rpartition("/")[2]
        streams = name == "StreamingEnqueue"
        request = {
            "StreamingEnqueue": "EnqueueRequest",
            "GetStatus": "Empty",
        }.get(name, f"{name}Request")
        function = getattr(self.host, name, None)
        if function is None:
            # KeepAlive, CloseContext, CleanupGraph and the like.
            self.host.note("other", name)
            request = "Empty"
            function = lambda *_: message("Empty")()  # noqa: E731
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if streams
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(
            function,
            request_deserializer=message(request).FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )


def main():
    host = StandInHost(bytes.fromhex(sys.argv[1]), sys.argv[2])
    limits = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.server(futures.ThreadPoolExecutor(16), options=limits)
    server.add_generic_rpc_handlers((_Service(host),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    # Until the test that started it ends it; or by itself, should that be lost.
    time.sleep(600)


if __name__ == "__main__":
    main()
