"""The handles of variables in a traced program, and how it reads them."""

import re

import tensorflow as tf
from cores import core_variables
from tensorflow.compiler.xla import xla_data_pb2

from gshard_tf.testing.tpu import bridge
from gshard_tf.testing.tpu.host_function import unescaped


def traced(strategy, model):
    """The variables of a model's forward pass, in TensorFlow's graph and in the module.

    Returns:
        handles: By the path of a weight, for each replica: whose handles the graph
            joins (replicas, cores), the shards along each dimension, the sharding.
        arguments: By the path of a weight: `[replicas][cores]` of the shards that
            make up the module's argument, and the annotation where it is read.
    """
    batch = tf.TensorSpec([16 // strategy.num_replicas_in_sync, 8], tf.int32)

    @tf.function(autograph=False)
    def step(ids):
        def forward(ids):
            return tf.reduce_sum(model(ids))

        return strategy.run(forward, args=(ids,))

    function = step.get_concrete_function(batch)
    owners = {
        id(shard.handle): (variable.path, replica, core)
        for variable in model.variables
        for replica, core, shard in core_variables(variable)
    }
    return {
        "handles": handles(function, owners),
        "arguments": arguments(function, owners),
    }


def handles(function, owners):
    inner = {
        id(symbol): owners[id(handle)]
        for handle, symbol in function.graph.captures
        if id(handle) in owners
    }
    results = {}
    for replicated in function.graph.get_operations():
        of_replicas = [each.op for each in replicated.inputs]
        if replicated.type != "TPUReplicatedInput" or any(
            op.type != "TPUPartitionedInputV2" for op in of_replicas
        ):
            continue
        given = [[inner[id(value)] for value in op.inputs] for op in of_replicas]
        [name] = {path for each in given for path, _, _ in each}
        results[name] = [
            {
                "replicas": sorted({replica for _, replica, _ in each}),
                "cores": [core for _, _, core in each],
                "dims": list(op.get_attr("partition_dims")),
                "sharding": sharding(op.get_attr("_XlaSharding")),
            }
            for op, each in zip(of_replicas, given, strict=True)
        ]
    return results


def arguments(function, owners):
    module = bridge.core_module(function)
    annotated = dict(
        re.findall(
            r'custom_call @Sharding\(%arg(\d+)\) \{.*?mhlo.sharding = "(.*?)"',
            module.stablehlo,
        )
    )
    captured = len(function.inputs) - len(function.captured_inputs)
    results = {}
    for i, argument in enumerate(module.arguments):
        if not argument.is_variable:
            continue
        given = [
            [owners[id(function.captured_inputs[n - captured])] for n in inputs]
            for inputs in argument.inputs
        ]
        [name] = {path for each in given for path, _, _ in each}
        text = annotated.get(str(i))
        results[name] = {
            "inputs": [[[r, core] for _, r, core in each] for each in given],
            "read as": None if text is None else sharding(unescaped(text)),
        }
    return results


def sharding(text):
    """The shards along each dimension, then copies; and the cores that have them."""
    proto = xla_data_pb2.OpSharding.FromString(text)
    return [
        list(proto.tile_assignment_dimensions),
        list(proto.tile_assignment_devices),
    ]
