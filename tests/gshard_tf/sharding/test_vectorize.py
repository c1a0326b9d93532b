"""A mapped function computes each element, on the devices that have it."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf

X = np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")
W = np.random.default_rng(1).normal(size=(4, 8, 8)).astype("float32")


def product(x, w):
    y = gshard_tf.annotate(tf.einsum("BM,MH->BH", x, w), ("batch", None))
    return tf.nn.relu(y)


def mapped(x, w):
    return gshard_tf.vmap(product, "stage")(x, w)


MESH = gshard_tf.create_mesh({"stage": 4, "data": 2}, "CPU")
RULES = gshard_tf.AxisRules({"stage": "stage", "batch": "data"})


def test_each_device_computes_its_elements():
    expected = np.maximum(np.einsum("PBM,PMH->PBH", X, W), 0)
    np.testing.assert_allclose(mapped(X, W), expected, rtol=1e-5, atol=1e-6)

    @tf.function
    def step(x, w):
        x = gshard_tf.annotate(x, ("stage", "batch", None))
        return mapped(x, gshard_tf.annotate(w, ("stage", None, None)))

    strategy = gshard_tf.SpmdStrategy(MESH, RULES)
    found = strategy.run(step, args=(tf.constant(X), tf.constant(W)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_dimension_of_one_leaves_the_others_split():
    """A pipeline of one stage, whose microbatches are split."""
    mesh = gshard_tf.create_mesh({"data": 2}, "CPU")
    rules = gshard_tf.AxisRules({"batch": "data"})
    strategy = gshard_tf.SpmdStrategy(mesh, rules)
    arguments = (tf.constant(X[:1]), tf.constant(W[:1]))
    found = strategy.run(tf.function(mapped), args=arguments)
    expected = np.maximum(np.einsum("PBM,PMH->PBH", X[:1], W[:1]), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with gshard_tf.use_mesh(mesh, rules):
        traced = tf.function(mapped, jit_compile=True).experimental_get_compiler_ir(
            *arguments
        )(stage="hlo")
    assert "sharding={devices=[2,1]" in traced


def test_annotations_hold_for_the_whole_tensor():
    with gshard_tf.use_mesh(MESH, RULES):
        traced = tf.function(mapped, jit_compile=True).experimental_get_compiler_ir(
            tf.constant(X), tf.constant(W)
        )(stage="hlo")
    # 4 stages, two parts of each one's batch.
    assert "sharding={devices=[4,2,1]" in traced


def test_only_annotate_knows_the_outer_dimension():
    for annotation in (
        lambda x: gshard_tf.split(x, 0, 2),
        lambda x: gshard_tf.shard(x, np.arange(8).reshape(8, 1)),
    ):
        with (
            gshard_tf.use_mesh(MESH, RULES),
            pytest.raises(ValueError, match="must use `annotate`"),
        ):
            tf.function(gshard_tf.vmap(annotation, "stage"))(X)


def test_a_manual_region_is_an_error():
    region = gshard_tf.manual(lambda x: 2 * x, [("batch", None)], ("batch", None))
    with pytest.raises(ValueError, match="Received: an operation XlaCallModule"):
        gshard_tf.vmap(region, "stage")(X)
