"""A training step sent to a stand-in TPU host; what arrives there, and compiles.

    python protocol.py '{"expert": 8}' v5e:2x4      mesh of one replica, on 8 cores

What follows the mesh are topologies of eight cores to compile for.

Prints the results as JSON.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback

import models
import numpy as np
import tensorflow as tf
from eager_service import message
from tensorflow.core.framework import function_pb2
from tensorflow.python import pywrap_mlir

import gshard_tf
from gshard_tf.runtime.devices import topology_devices
from gshard_tf.testing.tpu import bridge
from gshard_tf.testing.tpu.core_program import CoreProgram
from gshard_tf.testing.tpu.synthetic_slice import serialized_topology

HERE = pathlib.Path(__file__).parent
# On a TPU VM this is where everything but the TPU is; to the client of a remote host,
# the machine that it runs on itself, which then rewrites the step.
HERE_ON_THE_HOST = "/job:localhost/replica:0/task:0/device:CPU:0"
BATCH, STEPS, EPOCHS = 16, 2, 2


def train(address, mesh):
    """A user's program. It computes zeros: the host runs nothing."""
    strategy = gshard_tf.tpu_strategy(address, mesh)
    with strategy.scope():
        model = models.model()
    # As on a TPU VM, where the host of the TPU is this one: input pipelines run here.
    workers = {HERE_ON_THE_HOST: [HERE_ON_THE_HOST] * strategy.num_replicas_in_sync}
    strategy.extended._host_input_worker_devices = workers
    with tf.device(HERE_ON_THE_HOST):
        data = tf.data.Dataset.from_tensor_slices(models.data(STEPS * BATCH))
        dataset = data.batch(BATCH, drop_remainder=True)
        history = model.fit(dataset, epochs=EPOCHS, verbose=0).history
    return strategy, {name: values[-1] for name, values in history.items()}


def captured(folder):
    """The compile operations and the log."""
    compiles, executes = [], []
    for path in sorted(folder.glob("function_*.pb")):
        function = function_pb2.FunctionDef.FromString(path.read_bytes())
        for node in function.node_def:
            if node.op == "_TPUCompileMlir":
                compiles.append(node)
            if node.op.startswith("TPUExecute"):
                executes.append((function.signature.name, node))
    log = [line.split("\t") for line in (folder / "log.txt").read_text().splitlines()]
    return compiles, executes, log


def executions(executes, log):
    """For each execution: its core, and the cores whose variables it was given."""
    handles = {
        f"({line[3]}, 0)": line[2].rpartition("TPU:")[2]
        for line in log
        if line[0] == "operation" and line[1] == "VarHandleOp" and "TPU:" in line[2]
    }
    names = {name for name, _ in executes}
    runs = []
    for line in log:
        if line[0] == "run" and line[1] in names:
            given = {handles[handle] for handle in line[3:] if handle in handles}
            count = sum(handle in handles for handle in line[3:])
            runs.append([line[2].rpartition("TPU:")[2], sorted(given), count])
    return runs


def compiled(text, metadata, topologies, results):
    """Memory of the captured module by the TPU's own compiler."""
    lowered = pywrap_mlir.experimental_run_pass_pipeline(text, bridge._LOWER, False)
    module = bridge.CoreModule(
        stablehlo=lowered,
        replicas=metadata.num_replicas,
        cores=metadata.num_cores_per_replica,
        arguments=(),
        updates=(),
        outputs=(),
        result_shardings=(),
        use_spmd=metadata.use_spmd_for_xla_partitioning,
        host_operations=(),
    )
    results["left"] = re.findall(r'"tf\.\w+', lowered)
    for name in topologies:
        devices = topology_devices(name)
        program = CoreProgram(module, devices)
        results[f"kind {name}"] = devices[0].device_kind
        memory = program.memory
        results[f"memory {name}"] = [
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
        ]


def planned(mesh, topologies, results):
    ids, y = models.data(BATCH)
    for name in topologies:
        # The host that TensorFlow would ask by now is gone.
        with tf.device(HERE_ON_THE_HOST):
            plan = gshard_tf.plan(
                models.model,
                name,
                gshard_tf.create_mesh(mesh, "TPU"),
                batch=(ids, y),
                cache=False,
            )
        results[f"plan {name}"] = [plan.memory.arguments, plan.memory.temporaries]


def main(mesh, topologies):
    folder = pathlib.Path(tempfile.mkdtemp())
    topology = serialized_topology((2, 4, 1, 1)).hex()
    host = subprocess.Popen(  # noqa: S603
        [sys.executable, str(HERE / "stand_in_host.py"), topology, str(folder)],
        stdout=subprocess.PIPE,
        # Not inherited: should this process crash, its reader is not to wait for it.
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = host.stdout.readline().strip()
        strategy, logs = train(f"grpc://127.0.0.1:{port}", mesh)
    finally:
        host.terminate()
    compiles, executes, log = captured(folder)
    [compile_] = compiles
    metadata = message("CompileMetadata").FromString(compile_.attr["metadata"].s)
    results = {
        "replicas": metadata.num_replicas,
        "cores": metadata.num_cores_per_replica,
        "use_spmd": metadata.use_spmd_for_xla_partitioning,
        "arguments": [
            [
                [d.size for d in argument.shape.dim],
                list(argument.sharding.tile_assignment_dimensions),
                argument.kind,
            ]
            for argument in metadata.args
        ],
        "results": [
            list(result.sharding.tile_assignment_dimensions)
            for result in metadata.retvals
        ],
        "assigned": list(device_assignment(metadata.device_assignment)),
        "coordinates": strategy.device_assignment.core_assignment.tolist(),
        "executions": executions(executes, log),
        "execute operations": sorted({node.op for _, node in executes}),
        "logs": logs,
        "errors": [line for line in log if line[0] == "error"],
    }
    text = compile_.attr["mlir_module"].s.decode("utf-8", "surrogateescape")
    if importlib.util.find_spec("libtpu") and metadata.num_replicas == 1:
        compiled(text, metadata, topologies, results)
        planned(mesh, topologies, results)
    print(json.dumps(results), flush=True)


def device_assignment(text):
    """The numbers of a serialised `xla.DeviceAssignmentProto`, replica by replica."""
    from tensorflow.compiler.xla import xla_data_pb2

    proto = xla_data_pb2.DeviceAssignmentProto.FromString(text)
    ids = [list(each.replica_device_ids) for each in proto.computation_devices]
    return np.array(ids).T.tolist()


try:
    main(json.loads(sys.argv[1]), sys.argv[2:])
except BaseException:
    traceback.print_exc()
    os._exit(1)
# Without the host, which is gone: to free its memory would take for ever.
os._exit(0)
