"""Other projects' MoE blocks, and ours beside each, as forward and backward steps.

Each maker takes the shape and how to run it, and returns a function without arguments
that computes outputs and all gradients and returns the outputs first. Imports are
inside, so that one process holds one project.
"""

import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness.installed import missing
from benchmarks.moe.steps import (
    Shape,
    Side,
    in_tensorflow,
    layer_side,
    tokens_and_gradients,
)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One block to compare with.

    Attributes:
        make: `(shape, way) -> Side`.
        ways: How it can run; the fastest is compared.
        ours: Which of our layers stands beside it, a key of `OURS`.
        packages: Distributions that it needs, with the tested version.
        work: What it does otherwise than ours.
    """

    make: Callable[[Shape, str], Side]
    ways: tuple[str, ...]
    ours: str
    packages: dict[str, str]
    work: str

    def missing(self) -> list[str]:
        """Returns the packages to install, with their versions."""
        return [f"{name}=={self.packages[name]}" for name in missing(self.packages)]


def gated_width(shape: Shape) -> int:
    """H of gated experts with as many weights as plain ones: three matrices, not two.

    The rounding is st-moe-pytorch's.
    """
    return int(shape.hidden_dim * 2 / 3)


# ---------------------------------------------------------------------- our layers


def _ours(
    router: dict[str, Any], gated: bool = False, **options: Any
) -> Callable[[Shape, str], Side]:
    def make(shape: Shape, way: str) -> Side:
        if gated:
            shape = dataclasses.replace(shape, hidden_dim=gated_width(shape))
            options.update(gated=True, activation="silu")
        return layer_side(shape, way, router=router, **options)

    return make


OURS: dict[str, Callable[[Shape, str], Side]] = {
    "top2": _ours({"capacity_factor": 2.0}),
    "top2_gated": _ours({"capacity_factor": 2.0}, gated=True),
    "dropless_gated": _ours(
        {"kind": "top_k", "k": 2, "capacity_factor": "dropless"},
        gated=True,
        dispatcher="dropless",
    ),
    "top1": _ours({"kind": "top_k", "k": 1, "capacity_factor": 1.0}),
    "expert_choice": _ours({"kind": "expert_choice", "capacity_factor": 2.0}),
}
OUR_WAYS = ("jit", "ops")


# ---------------------------------------------------------------- TensorFlow peers


def _keras_step(layer: Any, call: Callable) -> Callable:
    import tensorflow as tf

    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
            losses = [tf.cast(loss, tf.float32) for loss in layer.losses]
            aux = tf.add_n(losses) if losses else tf.zeros([])
        # `value` is a tf.Variable in Keras 3; in Keras 2 each weight is one.
        weights = [
            weight if isinstance(weight, tf.Variable) else weight.value
            for weight in layer.trainable_variables
        ]
        gradients = tape.gradient([y, aux], [x, *weights], [dy, tf.ones([])])
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("A block must have gradients for all of its weights.")
        return [y, aux, *gradients]

    return step


def tf_models(shape: Shape, way: str) -> Side:
    import tensorflow as tf
    from official.nlp.modeling.layers import moe

    layer = moe.MoeLayer(
        moe.FeedForwardExperts(shape.experts, shape.hidden_dim, activation=tf.nn.relu),
        moe.ExpertsChooseMaskedRouter(shape.experts, export_metrics=False),
        train_capacity_factor=shape.capacity_factor,
    )
    layer(tf.zeros([shape.groups, shape.group_size, shape.model_dim]), training=True)
    step = _keras_step(layer, lambda x: layer(x, training=True))
    return in_tensorflow(step, tokens_and_gradients(shape), jit=way == "jit")


def keras_hub_mixtral(shape: Shape, way: str) -> Side:
    # Not public: keras-hub exports whole models, of which this is the block.
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

    block = MixtralSparseMoeBlock(
        shape.model_dim, gated_width(shape), shape.experts, top_k=2
    )
    block.build((shape.groups, shape.group_size, shape.model_dim))
    step = _keras_step(block, lambda x: block(x, training=True)[0])
    return in_tensorflow(step, tokens_and_gradients(shape), jit=way == "jit")


def mesh_tensorflow_top2(shape: Shape, way: str) -> Side:
    """Its graph is TensorFlow 1's: built once, run in a session.

    Gradients are computed and stay in the session, which may free each at once; only
    outputs come out.
    """
    del way
    import tensorflow as tf

    # The package asks TensorFlow for `estimator`, which left it in 2.16, to name the
    # modes of training and a base class. Nothing here uses them.
    tf.estimator = types.SimpleNamespace(
        ModeKeys=types.SimpleNamespace(TRAIN="train", EVAL="eval", PREDICT="infer"),
        CheckpointSaverListener=tf.compat.v1.train.CheckpointSaverListener,
        SessionRunHook=tf.compat.v1.train.SessionRunHook,
    )
    importlib.import_module("tensorflow.compat.v1").estimator = tf.estimator
    # And for a function that moved.
    importlib.import_module(
        "tensorflow.python.framework.ops"
    ).register_tensor_conversion_function = tf.register_tensor_conversion_function
    import mesh_tensorflow as mtf

    # The folder of the layers, without its trainer, which needs TensorFlow's old TPU
    # modules.
    folder = types.ModuleType("mesh_tensorflow.transformer")
    folder.__path__ = [os.path.join(mtf.__path__[0], "transformer")]
    sys.modules[folder.__name__] = folder
    from mesh_tensorflow.transformer import moe

    x, dy = tokens_and_gradients(shape)
    layer = moe.MoE1D(
        num_experts=shape.experts,
        hidden_size=shape.hidden_dim,
        group_size=shape.group_size,
        capacity_factor_train=shape.capacity_factor,
        second_threshold_train=0.5,
        min_expert_capacity=1,
    )
    graph = tf.Graph()
    with graph.as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        dims = [
            mtf.Dimension("batch", shape.groups),
            mtf.Dimension("length", shape.group_size),
            mtf.Dimension("d_model", shape.model_dim),
        ]
        # Variables, so that they are not fed anew at each step.
        variables = [
            tf.compat.v1.get_variable(f"held_{i}", initializer=a)
            for i, a in enumerate((x, dy))
        ]
        tokens, back = (
            mtf.import_tf_tensor(mesh, a.read_value(), mtf.Shape(dims))
            for a in variables
        )
        outputs, aux = moe.transformer_moe_layer_v1(
            tokens,
            dims[-1],
            layer._hparams,
            True,
            mtf.VariableDType(tf.float32, tf.float32, tf.float32),
            layout=mtf.convert_to_layout_rules(""),
            mesh_shape=mtf.convert_to_shape("all:1"),
            nonpadding=mtf.ones(mesh, mtf.Shape(dims[:-1])),
        )
        loss = mtf.reduce_sum(outputs * back) + aux
        weights = [v.outputs[0] for v in mesh.graph.trainable_variables]
        gradients = mtf.gradients([loss], [tokens, *weights])
        implementation = mtf.placement_mesh_impl.PlacementMeshImpl(
            mtf.convert_to_shape("all:1"), mtf.convert_to_layout_rules(""), ["cpu:0"]
        )
        lowering = mtf.Lowering(mesh.graph, {mesh: implementation})
        found = lowering.export_to_tf_tensor(outputs)
        # As targets of the run: what only control dependencies ask for is optimized
        # away.
        done = [lowering.export_to_tf_tensor(g).op for g in gradients]
        session = tf.compat.v1.Session(graph=graph)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(lowering.copy_masters_to_slices())
    return lambda: session.run([found, *done])


# --------------------------------------------------------------------- torch peers


def _torch_side(block: Any, shape: Shape, call: Callable) -> Side:
    """`call(block, x)` gives outputs and an auxiliary loss or None."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=shape.model_dim**-0.5)
    block.train()
    x, dy = (torch.from_numpy(a) for a in tokens_and_gradients(shape))
    x.requires_grad_(True)

    weights = list(block.parameters())

    def run() -> Any:
        y, aux = call(block, x)
        if aux is None:
            y.backward(dy)
        else:
            torch.autograd.backward([y, aux], [dy, torch.ones_like(aux)])
        gradients = [tensor.grad for tensor in (x, *weights)]
        # Gone between steps, as in the other runtimes.
        x.grad = None
        block.zero_grad(set_to_none=True)
        return [y.detach(), *gradients]

    return run


def transformers_mixtral(shape: Shape, way: str) -> Side:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.model_dim,
        intermediate_size=gated_width(shape),
        num_local_experts=shape.experts,
        num_experts_per_tok=2,
    )
    config._experts_implementation = way
    block = MixtralSparseMoeBlock(config)
    return _torch_side(block, shape, lambda block, x: (block(x), None))


def transformers_switch(shape: Shape, way: str) -> Side:
    del way
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=shape.model_dim,
        d_ff=shape.hidden_dim,
        num_experts=shape.experts,
        expert_capacity=shape.group_size // shape.experts,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        dense_act_fn="relu",
    )
    block = SwitchTransformersSparseMLP(config)
    return _torch_side(block, shape, lambda block, x: (block(x), None))


def st_moe(shape: Shape, way: str) -> Side:
    del way
    from st_moe_pytorch import MoE

    block = MoE(
        shape.model_dim,
        num_experts=shape.experts,
        expert_hidden_mult=shape.hidden_dim / shape.model_dim,
        gating_top_n=2,
        capacity_factor_train=shape.capacity_factor,
        threshold_train=0.5,
    )

    def call(block: Any, x: Any) -> Any:
        found = block(x)
        return found[0], found[1].sum()

    return _torch_side(block, shape, call)


def mixture_of_experts(shape: Shape, way: str) -> Side:
    del way
    from mixture_of_experts import MoE

    block = MoE(
        shape.model_dim,
        num_experts=shape.experts,
        hidden_dim=shape.hidden_dim,
        capacity_factor_train=shape.capacity_factor,
        second_threshold_train=0.5,
    )
    import torch

    block.experts.act = torch.nn.ReLU()
    return _torch_side(block, shape, lambda block, x: block(x))


_TORCH = {"torch": "2.13.0"}

PEERS: dict[str, Peer] = {
    "our one-hot einsum": Peer(
        _ours({"capacity_factor": 2.0}, dispatcher="einsum"), ("jit", "ops"), "top2",
        {}, "the same routing, moved by one-hot products as in the paper",
    ),
    "tf-models MoeLayer": Peer(
        tf_models, ("jit", "ops"), "expert_choice",
        {"tf-models-official": "2.20.0"},
        "expert choice, beside our expert choice; experts and router have biases",
    ),
    "mesh-tensorflow top-2": Peer(
        mesh_tensorflow_top2, ("session",), "top2", {"mesh-tensorflow": "0.1.21"},
        "the paper's top-2 with one-hot products, in a TensorFlow 1 session",
    ),
    "keras-hub Mixtral": Peer(
        keras_hub_mixtral, ("jit", "ops"), "dropless_gated", {"keras-hub": "0.32.0"},
        "every expert on every token, then weighted by top-2; drops nothing",
    ),
    "transformers Mixtral": Peer(
        transformers_mixtral, ("eager", "grouped_mm"), "dropless_gated",
        _TORCH | {"transformers": "5.23.0"},
        "top-2, drops nothing, computes no empty slots; no balancing loss in the block",
    ),
    "st-moe-pytorch": Peer(
        st_moe, ("eager",), "top2_gated", _TORCH | {"st-moe-pytorch": "0.1.8"},
        "top-2 with random second expert, gated by gelu, with biases and a z-loss",
    ),
    "transformers Switch": Peer(
        transformers_switch, ("eager",), "top1", _TORCH | {"transformers": "5.23.0"},
        "top-1, beside our top-1, capacity factor 1; a loop over experts that computes "
        "filled slots only; no balancing loss in the block",
    ),
    "mixture-of-experts": Peer(
        mixture_of_experts, ("eager",), "top2",
        _TORCH | {"mixture-of-experts": "0.2.3"},
        "the paper's top-2 with one-hot products",
    ),
}  # fmt: skip


def outputs_of(result: Any) -> np.ndarray:
    """The first of what a step returns, as an array."""
    return np.asarray(result[0])
