"""Which handles of variables a traced program is given, and how it reads them."""

import re

import tensorflow as tf
from cores import parts
from tensorflow.compiler.xla import xla_data_pb2

from gshard_tf.testing.tpu import bridge


def traced(strategy, model):
    """What a model's forward pass is given, in TensorFlow's graph and in the module.

    Returns:
        handles: By the path of a weight, for each replica: whose handles the graph
            puts together (replicas, cores), in what parts, by what sharding.
        arguments: By the path of a weight: `[replicas][cores]` of the parts that the
            module's argument is made of, and the annotation where it is read.
    """
    batch = tf.TensorSpec([16 // strategy.num_replicas_in_sync, 8], tf.int32)

    @tf.function(autograph=False)
    def step(ids):
        def forward(ids):
            return tf.reduce_sum(model(ids))

        return strategy.run(forward, args=(ids,))

    function = step.get_concrete_function(batch)
    owners = {
        id(part.handle): (variable.path, replica, core)
        for variable in model.variables
        for replica, core, part in parts(variable)
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
    found = {}
    for replicated in function.graph.get_operations():
        of_replicas = [each.op for each in replicated.inputs]
        if replicated.type != "TPUReplicatedInput" or any(
            op.type != "TPUPartitionedInputV2" for op in of_replicas
        ):
            continue
        given = [[inner[id(value)] for value in op.inputs] for op in of_replicas]
        [name] = {path for each in given for path, _, _ in each}
        found[name] = [
            {
                "replicas": sorted({replica for _, replica, _ in each}),
                "cores": [core for _, _, core in each],
                "dims": list(op.get_attr("partition_dims")),
                "sharding": sharding(op.get_attr("_XlaSharding")),
            }
            for op, each in zip(of_replicas, given, strict=True)
        ]
    return found


def arguments(function, owners):
    module = bridge.core_module(function)
    annotated = dict(
        re.findall(
            r'custom_call @Sharding\(%arg(\d+)\) \{.*?mhlo.sharding = "(.*?)"',
            module.stablehlo,
        )
    )
    captured = len(function.inputs) - len(function.captured_inputs)
    found = {}
    for i, argument in enumerate(module.arguments):
        if not argument.is_variable:
            continue
        given = [
            [owners[id(function.captured_inputs[n - captured])] for n in inputs]
            for inputs in argument.inputs
        ]
        [name] = {path for each in given for path, _, _ in each}
        text = annotated.get(str(i))
        found[name] = {
            "inputs": [[[r, core] for _, r, core in each] for each in given],
            "read as": None if text is None else sharding(bridge.unescaped(text)),
        }
    return found


def sharding(text):
    """How many parts each dimension has, then copies; and which cores hold them."""
    found = xla_data_pb2.OpSharding.FromString(text)
    return [
        list(found.tile_assignment_dimensions),
        list(found.tile_assignment_devices),
    ]
