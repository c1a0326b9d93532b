"""The plans that are compared with files: what partitioning makes of a few models.

After a change that is meant to change them:

    python tests/gshard_tf/planning/golden_plans.py

writes the files anew; read the difference before committing it.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import tensorflow as tf

import gshard_tf
from gshard_tf.optimizers import Adafactor
from keras_layers import Transformer

FOLDER = pathlib.Path(__file__).parent / "golden"
LENGTH = 32


def transformer(**options):
    def build():
        model = Transformer(
            512, 512, 2, 2, 64, 128, 4, num_experts=8, seed=0, name="model", **options
        )
        model.compile(
            Adafactor(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return model

    return build


def batch(rows):
    ids = tf.TensorSpec([rows, LENGTH], tf.int32)
    return (ids, ids), ids


SPREAD = {"batch": "data", "group": "data", "expert": "data"}

#: Name -> what `plan` is called with.
GOLDEN = {
    "transformer-cpu-4x2": (
        transformer(),
        "cpu:8",
        {"data": 4, "model": 2},
        gshard_tf.AxisRules({**SPREAD, "mlp": "model", "heads": "model"}),
    ),
    "transformer-fsdp-cpu-8": (
        transformer(),
        "cpu:8",
        {"data": 8},
        gshard_tf.AxisRules(SPREAD, fsdp="data", fsdp_min_bytes=8192),
    ),
    "transformer-v5e-2x4": (transformer(), "v5e:2x4", {"expert": 8}, None),
    "transformer-stacked-v3-2x2": (
        transformer(stacked=True, remat=True),
        "v3:2x2",
        {"expert": 8},
        None,
    ),
}


def normalised(name):
    """What of a plan must stay: layouts, counts and bytes, not times."""
    build, topology, mesh, rules = GOLDEN[name]
    keras.backend.clear_session(free_memory=False)
    plan = gshard_tf.plan(build, topology, mesh, rules, batch(8), cache=False)
    communication = {}
    for each in plan.communication:
        key = f"{each.kind} over {each.axis} in {each.layer or 'no layer'}"
        count, size = communication.get(key, (0, 0))
        communication[key] = (count + each.count, size + each.bytes)
    return {
        "weights": {
            weight.path: [
                list(weight.shape),
                list(weight.layout),
                weight.bytes_per_core,
                weight.rule,
            ]
            for weight in sorted(plan.weights, key=lambda weight: weight.path)
            if weight.role != "other"
        },
        "state_bytes_per_core": plan.state_bytes(per_core=True),
        "flops_over_written": round(plan.flops_ratio, 2),
        "communication": {
            key: list(communication[key]) for key in sorted(communication)
        },
        "reshards": [
            [r.kind, r.layer, r.shape, r.axis, r.count] for r in plan.reshards
        ],
    }


def as_text(name):
    """One line per entry, so that a difference can be read."""
    return written(normalised(name))


def written(plan):
    def lines(value):
        if isinstance(value, dict):
            entries = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            return "{\n" + ",\n".join(entries) + "\n }"
        return json.dumps(value)

    parts = [f" {json.dumps(key)}: {lines(value)}" for key, value in plan.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    gshard_tf.request_cpu_devices(8)
    FOLDER.mkdir(exist_ok=True)
    for each in sys.argv[1:] or GOLDEN:
        (FOLDER / f"{each}.json").write_text(as_text(each))
        print(each)
