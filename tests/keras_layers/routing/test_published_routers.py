"""The same logits through the routers of other projects, which run beside ours.

They are installed by the extra `benchmarks`; without it these tests are skipped.
"""

import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_layers import ExpertChoiceRouter, Top2Router, TopKRouter
from keras_layers.routing import top2_assignment

G, S, E = 3, 20, 6
NEEDS = "installed by: pip install 'gshard-tf[benchmarks]'"


def logits_of(seed=0):
    rng = np.random.default_rng(seed)
    # Uneven, so that some experts overflow.
    return (rng.normal(size=(G, S, E)) + rng.normal(size=E)).astype(np.float32)


def combine_weights(routing):
    """The paper's combine tensor summed over slots, `[G, S, E]`."""
    hot = np.eye(E, dtype=np.float32)[routing.expert_index.numpy()]  # [G, S, K, E]
    return np.einsum("gske,gsk->gse", hot, routing.weight.numpy())


def slots(routing):
    """Slot of each (token, expert), -1 for none: `[G, S, E]`."""
    found = np.full((G, S, E), -1)
    index, slot = routing.expert_index.numpy(), routing.slot.numpy()
    for g, s, k in zip(*np.nonzero(routing.dispatched.numpy()), strict=True):
        found[g, s, index[g, s, k]] = slot[g, s, k]
    return found


# ------------------------------------------------------------------- Mesh TensorFlow


def mesh_tensorflow_gating(logits, capacity, policy, threshold, uniforms):
    """`_top_2_gating`'s combine tensor `[G, S, E, C]` and its loss."""
    # Of the time of TensorFlow 1: it needs names that are gone, for what is not used.
    import tensorflow.compat.v1 as v1
    from tensorflow.python.framework import ops

    if not hasattr(tf, "estimator"):
        tf.estimator = v1.estimator = types.SimpleNamespace(
            CheckpointSaverListener=object,
            SessionRunHook=object,
            ModeKeys=types.SimpleNamespace(TRAIN="train", EVAL="eval", PREDICT="infer"),
        )
        ops.register_tensor_conversion_function = tf.register_tensor_conversion_function
    # Training loops, of estimators throughout; the gating does not use them.
    utils = "mesh_tensorflow.transformer.utils"
    sys.modules.setdefault(utils, types.ModuleType(utils))
    mtf = pytest.importorskip("mesh_tensorflow", reason=NEEDS)
    from mesh_tensorflow.transformer import moe

    dims = [mtf.Dimension(n, size) for n, size in (("g", G), ("s", S), ("m", E))]
    hparams = types.SimpleNamespace(
        moe_word_embed_mode=None,
        moe_use_second_place_loss=False,
        moe_z_loss=None,
        moe_second_policy_eval=policy,
        moe_second_threshold_eval=threshold,
    )
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh = mtf.Mesh(graph, "mesh")
        inputs = mtf.import_tf_tensor(mesh, tf.constant(logits), mtf.Shape(dims))
        before = mtf.random_uniform
        mtf.random_uniform = lambda mesh, shape: mtf.import_tf_tensor(
            mesh, tf.constant(uniforms), shape
        )
        try:
            _, combine, loss = moe._top_2_gating(
                inputs,
                None,
                mtf.Dimension("experts", E),
                mtf.Dimension("capacity", capacity),
                hparams,
                train=False,
                variable_dtype=mtf.VariableDType(),
            )
        finally:
            mtf.random_uniform = before
        layout = mtf.placement_mesh_impl.PlacementMeshImpl([], [], [""])
        lowering = mtf.Lowering(graph, {mesh: layout})
        results = [lowering.export_to_tf_tensor(x) for x in (combine, loss)]
        with tf.compat.v1.Session() as session:
            [kernel] = tf.compat.v1.global_variables()  # of the gating's own product
            session.run(kernel.initializer)
            session.run(kernel.assign(np.eye(E, dtype=np.float32)))
            session.run(lowering.copy_masters_to_slices())
            return session.run(results)


@pytest.mark.parametrize(
    ("policy", "threshold"), [("all", 0.5), ("threshold", 0.3), ("random", 0.5)]
)
@pytest.mark.parametrize("capacity", [3, 7])
def test_mesh_tensorflow(policy, threshold, capacity):
    logits = logits_of()
    uniforms = np.random.default_rng(1).random((G, S)).astype(np.float32)
    combine, loss = mesh_tensorflow_gating(
        logits, capacity, policy, threshold, uniforms
    )
    router = Top2Router.as_in(
        "mesh_tensorflow",
        E,
        second_expert_policy=policy,
        second_expert_threshold=threshold,
    )
    ours = top2_assignment(
        tf.nn.softmax(logits),
        capacity,
        None,
        tf.constant(uniforms),
        router.drop_frees_slot,
        policy=policy,
        threshold=threshold,
        legacy_mtf_behavior=router.legacy_mtf_behavior,
    )
    np.testing.assert_allclose(combine_weights(ours), combine.sum(-1), atol=1e-6)
    theirs = np.where(combine.any(-1), combine.argmax(-1), -1)
    np.testing.assert_array_equal(slots(ours), theirs)
    _, _, aux_loss = router.route(tf.constant(logits), capacity, None, False)
    np.testing.assert_allclose(aux_loss, loss, rtol=1e-5)


# --------------------------------------------------------------------------- tf-models


def test_tf_models_expert_choice():
    moe = pytest.importorskip("official.nlp.modeling.layers.moe", reason=NEEDS)
    import tf_keras

    logits = logits_of()
    theirs = moe.ExpertsChooseMaskedRouter(
        num_experts=E,
        jitter_noise=0.0,
        use_bias=False,
        kernel_initializer=tf_keras.initializers.Identity(),
        router_z_loss_weight=0.0,
        export_metrics=False,
    )
    masks = theirs(tf.constant(logits), expert_capacity=5, training=False)
    # [G, S, E, C] and [G, S, E, C]
    dispatch = np.asarray(masks.dispatch_mask)
    combine = np.asarray(masks.combine_array)
    ours, _, _ = ExpertChoiceRouter(E).route(tf.constant(logits), 5, None, False)
    np.testing.assert_array_equal(ours.chosen, dispatch.sum(-1))
    weight = np.zeros((G, S, E), np.float32)
    for g, e, c in np.ndindex(*ours.token_index.shape):
        weight[g, ours.token_index[g, e, c], e] = ours.weight[g, e, c]
    np.testing.assert_allclose(weight, combine.sum(-1), atol=1e-6)


# ----------------------------------------------------------- Hugging Face transformers


def test_switch_transformers():
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    from transformers.models.switch_transformers import (
        modeling_switch_transformers as switch,
    )

    logits = logits_of()
    config = transformers.SwitchTransformersConfig(
        num_experts=E, expert_capacity=4, hidden_size=E, router_bias=False
    )
    router = switch.SwitchTransformersTop1Router(config).eval()
    with torch.no_grad():
        router.classifier.weight.copy_(torch.eye(E))
        kept, probability, _ = router(torch.tensor(logits))
    ours, _, _ = TopKRouter(E, 1).route(tf.constant(logits), 4, None, False)
    np.testing.assert_array_equal(slots(ours) >= 0, kept.numpy() > 0)
    np.testing.assert_allclose(
        combine_weights(ours), (kept * probability).numpy(), atol=1e-6
    )


def transformers_top_k(name, config_name, options):
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    import importlib

    folder, router_name = name
    modeling = importlib.import_module(
        f"transformers.models.{folder}.modeling_{folder}"
    )
    config = getattr(transformers, config_name)(hidden_size=E, **options)
    router = getattr(modeling, router_name)(config).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(torch.linspace(0.0, 0.5, E))
        _, weight, index = router(torch.tensor(logits_of().reshape(-1, E)))
    combine = np.zeros((G * S, E), np.float32)
    np.put_along_axis(combine, index.numpy(), weight.numpy(), axis=1)
    return combine.reshape(G, S, E)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            (
                ("mixtral", "MixtralTopKRouter"),
                "MixtralConfig",
                {"num_local_experts": E, "num_experts_per_tok": 2},
            ),
            {"k": 2},
        ),
        (
            (
                ("qwen3_moe", "Qwen3MoeTopKRouter"),
                "Qwen3MoeConfig",
                {"num_experts": E, "num_experts_per_tok": 3, "norm_topk_prob": False},
            ),
            {"k": 3, "normalize_weights": False},
        ),
        (
            (
                ("deepseek_v3", "DeepseekV3TopkRouter"),
                "DeepseekV3Config",
                {
                    "n_routed_experts": E,
                    "num_experts_per_tok": 3,
                    "n_group": 1,
                    "topk_group": 1,
                    "norm_topk_prob": True,
                    "routed_scaling_factor": 1.0,
                },
            ),
            {"k": 3, "scores": "sigmoid", "bias_update_rate": 1e-3},
        ),
    ],
    ids=["mixtral", "qwen3", "deepseek_v3"],
)
def test_transformers(theirs, ours):
    # These drop nothing, so neither do we.
    expected = transformers_top_k(*theirs)
    router = TopKRouter(E, capacity_factor="dropless", **ours)
    router.build((None, None, E))
    if router.bias is not None:
        router.bias.assign(keras.ops.linspace(0.0, 0.5, E))
    routing, _, _ = router.route(tf.constant(logits_of()), S, None, False)
    np.testing.assert_allclose(combine_weights(routing), expected, atol=1e-6)
