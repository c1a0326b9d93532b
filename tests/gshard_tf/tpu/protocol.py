"""A training step sent to a stand-in TPU host; what arrives there, and compiles.

    python protocol.py '{"expert": 8}'      mesh of one replica, on 8 cores

Prints what it found as JSON.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import models
import numpy as np
import tensorflow as tf
from eager_service import message
from tensorflow.core.framework import function_pb2
from tensorflow.python import pywrap_mlir

import gshard_tf
from gshard_tf.devices import topology_devices
from gshard_tf.tpu import bridge
from gshard_tf.tpu.program import CoreProgram

HERE = pathlib.Path(__file__).parent
# On a TPU VM this is where everything but the TPU is; to the client of a remote host,
# the machine that it runs on itself, which then rewrites the step.
HERE_ON_THE_HOST = "/job:localhost/replica:0/task:0/device:CPU:0"
BATCH = 16


def train(address, mesh, folder):
    """A user's program, until all cores have been asked to execute its step.

    It does not end: the client waits for what the cores would compute.
    """
    strategy = gshard_tf.tpu_strategy(address, mesh)
    with strategy.scope():
        model = models.model()
        model.optimizer.build(model.trainable_variables)
    ids, y = models.data(BATCH)
    with tf.device(HERE_ON_THE_HOST):
        batch = (tf.constant(ids), tf.constant(y))
    with strategy.scope():
        # As `fit` does before it traces a step.
        model._symbolic_build(data_batch=batch)

    @tf.function
    def step(batch):
        return strategy.run(model.train_step, args=(batch,))

    def run():
        with tf.device(HERE_ON_THE_HOST):
            step(batch)

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + 180
    cores = strategy.device_assignment.core_assignment[..., 0].size
    while len(asked_to_run(folder)) < cores:
        if time.monotonic() > deadline:
            raise TimeoutError(f"asked to run: {asked_to_run(folder)}")
        time.sleep(0.5)
    return strategy


def asked_to_run(folder):
    text = (folder / "log.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines() if line.startswith("run\t")]
    return [line[2] for line in lines if "TPU:" in line[2]]


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
    made = {
        f"({line[3]}, 0)": line[2].rpartition("TPU:")[2]
        for line in log
        if line[0] == "operation" and line[1] == "VarHandleOp" and "TPU:" in line[2]
    }
    names = {name for name, _ in executes}
    found = []
    for line in log:
        if line[0] == "run" and line[1] in names:
            given = {made[handle] for handle in line[3:] if handle in made}
            count = sum(handle in made for handle in line[3:])
            found.append([line[2].rpartition("TPU:")[2], sorted(given), count])
    return found


def compiled(text, metadata, found):
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
    found["left"] = re.findall(r'"tf\.\w+', lowered)
    for name in ("v5e:2x4", "v4:2x2x2"):
        program = CoreProgram(module, topology_devices(name))
        memory = program.memory
        found[f"memory {name}"] = [
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
        ]


def planned(mesh, found):
    ids, y = models.data(BATCH)
    plan = gshard_tf.plan(
        models.model,
        "v5e:2x4",
        gshard_tf.create_mesh(mesh, "TPU"),
        batch=(ids, y),
        cache=False,
    )
    found["plan"] = [plan.memory.arguments, plan.memory.temporaries]


def main(mesh):
    folder = pathlib.Path(tempfile.mkdtemp())
    host = subprocess.Popen(  # noqa: S603
        [sys.executable, str(HERE / "stand_in_host.py"), "2,4,1,1", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = host.stdout.readline().strip()
        strategy = train(f"grpc://127.0.0.1:{port}", mesh, folder)
    finally:
        host.terminate()
    compiles, executes, log = captured(folder)
    [compile_] = compiles
    metadata = message("CompileMetadata").FromString(compile_.attr["metadata"].s)
    found = {
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
        "wanted": strategy.device_assignment.core_assignment.tolist(),
        "executions": executions(executes, log),
        "execute operations": sorted({node.op for _, node in executes}),
        "errors": [line for line in log if line[0] == "error"],
    }
    text = compile_.attr["mlir_module"].s.decode("utf-8", "surrogateescape")
    if importlib.util.find_spec("libtpu") and metadata.num_replicas == 1:
        compiled(text, metadata, found)
        planned(mesh, found)
    print(json.dumps(found), flush=True)
    os._exit(0)  # with a thread that waits for ever


def device_assignment(text):
    """The numbers of a serialised `xla.DeviceAssignmentProto`, replica by replica."""
    from tensorflow.compiler.xla import xla_data_pb2

    proto = xla_data_pb2.DeviceAssignmentProto.FromString(text)
    ids = [list(each.replica_device_ids) for each in proto.computation_devices]
    return np.array(ids).T.tolist()


main(json.loads(sys.argv[1]))
