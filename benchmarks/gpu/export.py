"""Saves the MoE layer's forward and backward as programs, for `benchmarks.gpu.measure`.

    python -m benchmarks.gpu.export FOLDER [--grid gpu|cpu|quick]

Runs where TensorFlow is and allocates no weights, so a layer of 34 GB can be saved on a
laptop. The folder (a few MB at most) goes to the machine that measures.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it only exports

import keras
import tensorflow as tf

import gshard_tf
from benchmarks.harness.command_line import say
from benchmarks.moe.steps import Shape
from gshard_tf import export
from gshard_tf.spmd.abstract import AbstractStrategy
from keras_layers import MoELayer

GROUP = 2048
DISPATCHERS = ("index", "einsum")


def _shape(model_dim: int, hidden_dim: int, experts: int, tokens: int) -> Shape:
    return Shape(experts, model_dim, hidden_dim, tokens // GROUP, GROUP)


#: Keras dtype policy and shapes of each grid.
GRIDS: dict[str, tuple[str, list[Shape]]] = {
    "gpu": (
        "bfloat16",
        [
            _shape(1024, 4096, 8, 16384),
            _shape(1024, 4096, 64, 65536),
            _shape(2048, 8192, 8, 16384),
            _shape(2048, 8192, 16, 32768),
            _shape(2048, 8192, 64, 65536),
            _shape(4096, 16384, 8, 16384),
            _shape(4096, 16384, 16, 32768),
            _shape(4096, 16384, 64, 65536),
        ],
    ),
    "cpu": (
        "float32",
        [
            Shape(8, 256, 1024, 4, 1024),
            Shape(64, 256, 1024, 4, 1024),
            Shape(8, 512, 2048, 4, 1024),
            Shape(32, 512, 2048, 4, 1024),
        ],
    ),
    "quick": ("float32", [Shape(4, 16, 32, 2, 32)]),
}


class LayerStep(keras.Model):
    """A `MoELayer` whose "prediction" is its output and all of its gradients."""

    def __init__(self, layer: MoELayer):
        super().__init__(name="moe_step")
        self.layer = layer

    def call(self, inputs: Any) -> tf.Tensor:
        return self.layer(inputs[0], training=True)

    def predict_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, dy = data[0]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.layer(x, training=True)
            aux = tf.add_n(self.layer.losses)
        weights = [weight.value for weight in self.layer.trainable_variables]
        back = [dy, tf.ones_like(aux)]
        d_x, *gradients = tape.gradient([y, aux], [x, *weights], back)
        return {"y": y, "aux": aux, "d_x": d_x, "d_weights": gradients}


def save(path: pathlib.Path, shape: Shape, dispatcher: str, policy: str) -> None:
    """Writes the program of one layer."""
    keras.backend.clear_session()
    strategy = AbstractStrategy(gshard_tf.create_mesh({"expert": 1}))
    size = (shape.groups, shape.group_size, shape.model_dim)
    dtype = keras.DTypePolicy(policy).compute_dtype
    tokens = tf.TensorSpec(size, dtype)
    with strategy.scope():
        layer = MoELayer(
            shape.experts,
            shape.hidden_dim,
            router={"capacity_factor": shape.capacity_factor},
            dispatcher=dispatcher,
            seed=0,
            dtype=policy,
        )
        layer.build(size)
        model = LayerStep(layer)
        model.built = True
        export.step_program(model, "predict", ((tokens, tokens),)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path, help="where; it is made")
    parser.add_argument("--grid", choices=GRIDS, default="gpu", help="which shapes")
    options = parser.parse_args()
    policy, shapes = GRIDS[options.grid]
    index = []
    for number, shape in enumerate(shapes):
        files = {}
        for dispatcher in DISPATCHERS:
            files[dispatcher] = f"{number}-{dispatcher}.gshard"
            save(options.folder / files[dispatcher], shape, dispatcher, policy)
        say(f"saved {shape}")
        fields = dataclasses.asdict(shape) | {
            "tokens": shape.tokens,
            "capacity": shape.capacity,
            "matmul_flops": shape.matmul_flops,
        }
        index.append({"shape": fields, "files": files})
    index_file = {"grid": options.grid, "policy": policy, "rows": index}
    (options.folder / "index.json").write_text(json.dumps(index_file, indent=1) + "\n")


if __name__ == "__main__":
    main()
