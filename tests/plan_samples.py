"""Plans made by hand, to see how they are shown. Their figures are plausible only."""

import dataclasses

from gshard_tf.planning.plan import Plan
from gshard_tf.planning.records import (
    Buffer,
    Communication,
    Memory,
    OutOfMemory,
    Reshard,
    StepTime,
    Weight,
)

V3 = {
    "name": "v3",
    "devices": 2,
    "flops": 123e12,
    "hbm_bytes": 32 * 2**30,
    "hbm_bandwidth": 900e9,
    "link_bandwidth": 41e9,
}
V5E = {
    "name": "v5e",
    "devices": 1,
    "flops": 197e12,
    "hbm_bytes": 16e9,
    "hbm_bandwidth": 819e9,
    "link_bandwidth": 50e9,
}
V4 = V3 | {"name": "v4", "flops": 275e12, "hbm_bandwidth": 1228e9}
VERSIONS = {"tensorflow": "2.20.0", "keras": "3.15.1", "jaxlib": "0.10.2"}
ASSUMPTIONS = [
    "Matmuls at the chip's peak in bfloat16, also where the step is in float32.",
    "Links at 41 GB/s in each direction, lines, not rings, along each dimension; no "
    "latency, no contention between collectives.",
    "No input pipeline, no host, no launch cost.",
]


def weight(path, shape, layout, mesh, role="weight", dtype="float32", rule="names"):
    size = {"float32": 4, "bfloat16": 2, "int32": 4, "uint32": 4}[dtype]
    shards = 1
    for n in shape:
        size *= n
    for axis in layout:
        shards *= mesh.get(axis, 1)
    return Weight(path, role, shape, dtype, layout, size, size // shards, rule)


def with_slots(weights, mesh):
    """The weights, Adam's two slots of each, and what else a step has."""
    slots = [
        dataclasses.replace(
            w,
            path=f"adam/{w.path.replace('/', '_')}_{slot}",
            role="optimizer",
            rule="slot of its weight",
        )
        for w in weights
        for slot in ("momentum", "velocity")
    ]
    other = [
        weight("adam/iteration", (), (), mesh, "optimizer", "int32", "no rule"),
        weight("mean_metric/total", (), (), mesh, "other", rule="no rule"),
        weight("dropout/seed_state", (2,), (None,), mesh, "other", "uint32", "no rule"),
    ]
    return [*weights, *slots, *other]


def moe(cores=128, layers=12, topology="v3:8x8", shape=(8, 8), **changes):
    """A Transformer whose every other layer has an expert a core."""
    mesh = {"expert": cores}
    weights = [weight("lm/embedding/embeddings", (32000, 1024), (None, None), mesh)]
    communication, by_layer = [], {"lm/logits": 4.0e12}
    for i in range(layers):
        block = f"lm/encoder_{i}"
        for name in ("query", "key", "value"):
            path = f"{block}/attention/{name}/kernel"
            weights.append(weight(path, (1024, 16, 128), (None, None, None), mesh))
        weights.append(
            weight(f"{block}/norm/gamma", (1024,), (None,), mesh, rule="no rule")
        )
        by_layer[f"{block}/attention"] = 1.1e12
        for name, layer in (("attention", f"{block}/attention"),):
            del name
            communication.append(
                Communication("all-reduce", layer, "expert", 4, 33_600_000, 4e-4, True)
            )
        if i % 2:
            name = f"{block}/moe"
            weights += [
                weight(f"{name}/router/kernel", (1024, cores), (None, None), mesh),
                weight(f"{name}/wi", (cores, 1024, 8192), ("expert", None, None), mesh),
                weight(f"{name}/wo", (cores, 8192, 1024), ("expert", None, None), mesh),
            ]
            by_layer[name] = 3.3e12
            communication += [
                Communication("all-to-all", name, "expert", 4, 134_217_728, 9e-4, True),
                Communication("all-reduce", name, "expert", 3, 524_288, 1e-5, True),
            ]
        else:
            name = f"{block}/mlp"
            weights += [
                weight(f"{name}/wi/kernel", (1024, 8192), (None, None), mesh),
                weight(f"{name}/wo/kernel", (8192, 1024), (None, None), mesh),
            ]
            by_layer[name] = 1.6e12
            communication.append(
                Communication("all-reduce", name, "expert", 2, 67_108_864, 8e-4, True)
            )
    communication += [
        Communication("all-gather", "lm/logits", "expert", 2, 262_144_000, 3e-3, False),
        Communication("collective-permute", "", "expert", 6, 8192, 1e-6, True),
    ]
    weights = with_slots(weights, mesh)
    state = sum(w.bytes_per_core for w in weights)
    flops = sum(by_layer.values())
    made = Plan(
        model="lm",
        mode="train",
        topology=topology,
        chip=V3,
        slice_shape=shape,
        mesh=mesh,
        rules={"batch": "expert", "group": "expert", "expert": "expert", "mlp": None},
        inputs=[f"int32[{cores * 8},1024]", f"int32[{cores * 8},1024]"],
        weights=weights,
        memory=Memory(
            arguments=state + 70_000,
            outputs=1_048_576,
            temporaries=4_900_000_000,
            code=61_000_000,
            capacity=16 * 2**30,
        ),
        out_of_memory=None,
        flops=flops,
        flops_as_written=flops / 1.043,
        flops_by_layer=by_layer,
        bytes_accessed=6.1e11,
        communication=communication,
        reshards=[
            Reshard(
                kind="all-gather",
                layer="lm/logits",
                operation="einsum",
                shape="f32[8,1024,32000]",
                axis="expert",
                count=2,
                bytes=262_144_000,
                advice="Something is split over 'expert' along dimension 0 and wanted "
                "whole. To keep it split, annotate the result of `einsum`: "
                "gshard_tf.annotate(x, ('batch', None, None)).",
            )
        ],
        time=StepTime(
            compute=flops / 61.5e12,
            hbm=6.1e11 / 450e9,
            interconnect=sum(c.seconds for c in communication),
            compiler=1.71,
            assumptions=ASSUMPTIONS,
        ),
        complaints=["The rule 'heads': 'expert' matches nothing."],
        advice=[],
        trace_seconds=41.2,
        compile_seconds=188.0,
        host_bytes=9_700_000_000,
        versions=VERSIONS | {"libtpu": "0.0.52"},
        key="0" * 16,
    )
    return dataclasses.replace(made, **changes)


def giant():
    """The paper's largest: 36 layers of 2,048 experts on 2,048 cores."""
    return moe(2048, 36, "v3:32x32", (32, 32))


def out_of_memory():
    """A dense model that a small slice cannot hold."""
    mesh = {"data": 8}
    weights = [weight("lm/embedding/embeddings", (256000, 4096), (None, None), mesh)]
    for i in range(8):
        for name in ("wi", "wo"):
            path = f"lm/encoder_{i}/mlp/{name}/kernel"
            weights.append(weight(path, (4096, 16384), (None, None), mesh))
    buffers = [
        Buffer(8_388_608_000, "f32[8,1024,256000]", "lm/logits", "einsum"),
        Buffer(4_194_304_000, "f32[256000,4096]", "lm/embedding", "parameter"),
        Buffer(2_147_483_648, "f32[8,16,2048,2048]", "lm/encoder_3/attention", "exp"),
        Buffer(268_435_456, "f32[4096,16384]", "lm/encoder_0/mlp", "dot_general"),
        Buffer(268_435_456, "f32[4096,16384]", "", ""),
    ]
    return moe(
        chip=V5E,
        topology="v5e:2x4",
        slice_shape=(2, 4),
        mesh=mesh,
        rules={"batch": "data", "group": "data", "expert": "data"},
        inputs=["int32[64,1024]", "int32[64,1024]"],
        weights=with_slots(weights, mesh),
        memory=None,
        out_of_memory=OutOfMemory(
            needed=43.9 * 2**30,
            capacity=15.75 * 2**30,
            buffers=buffers,
            message="RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used "
            "43.90G of 15.75G hbm. Exceeded hbm capacity by 28.15G.",
        ),
        flops=None,
        flops_by_layer={},
        bytes_accessed=None,
        communication=[],
        reshards=[],
        time=None,
        complaints=[],
        advice=[
            "The state alone takes 25.2 of 16.0 GB a core.",
            "Every core holds all of 17 large variables (lm/embedding/embeddings, ...):"
            " split them over an axis of the mesh (data) by AxisRules.",
            "Activations take most of the rest: compute them again in the backward "
            "pass (remat=True of Transformer and its blocks).",
        ],
    )


def cpu():
    """On virtual devices: no chip, no capacity, no estimate of time."""
    made = moe(4, 2, "cpu:4", (4,))
    return dataclasses.replace(
        made,
        chip=None,
        memory=dataclasses.replace(made.memory, capacity=None, code=0),
        communication=[dataclasses.replace(c, seconds=0.0) for c in made.communication],
        time=None,
        versions=VERSIONS,
    )


def two_axes():
    """Tokens over one axis of the mesh, widths over the other."""
    mesh = {"data": 8, "model": 4}
    weights = [weight("lm/embedding/embeddings", (32000, 2048), ("model", None), mesh)]
    communication = []
    for i in range(4):
        block = f"lm/encoder_{i}"
        weights += [
            weight(f"{block}/mlp/wi/kernel", (2048, 8192), (None, "model"), mesh),
            weight(f"{block}/mlp/wo/kernel", (8192, 2048), ("model", None), mesh),
            weight(f"{block}/moe/wi", (64, 2048, 8192), ("data", None, "model"), mesh),
        ]
        communication += [
            Communication(
                "all-reduce", f"{block}/mlp", "model", 2, 1_200_000_000, 0.011, True
            ),
            Communication(
                "reduce-scatter", f"{block}/mlp", "data", 1, 16_000_000, 8e-4, True
            ),
            Communication(
                "all-gather", f"{block}/mlp", "data+model", 1, 700_000_000, 3e-3, False
            ),
            Communication(
                "all-to-all", f"{block}/moe", "data", 4, 900_000_000, 0.012, True
            ),
        ]
    return moe(
        chip=V4,
        topology="v4:2x2x4",
        slice_shape=(2, 2, 4),
        mesh=mesh,
        rules={
            "batch": "data",
            "group": "data",
            "expert": "data",
            "mlp": "model",
            "heads": "model",
            "vocab": "model",
        },
        weights=with_slots(weights, mesh),
        memory=Memory(12_400_000_000, 0, 3_700_000_000, 21_000_000, 16 * 2**30),
        flops_by_layer={f"lm/encoder_{i}/{n}": 2.2e12 for i in range(4)
                        for n in ("mlp", "moe")},
        flops=17.6e12,
        flops_as_written=17.1e12,
        communication=communication,
        advice=["Halve activations by bfloat16."],
        time=StepTime(0.128, 0.101, 0.311, None, ASSUMPTIONS),
    )  # fmt: skip


ALL = {
    "moe": moe,
    "giant": giant,
    "out_of_memory": out_of_memory,
    "cpu": cpu,
    "two_axes": two_axes,
}
