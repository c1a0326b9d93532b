"""Dispatchers against loops and against each other."""

import numpy as np
import pytest
import tensorflow as tf

from keras_layers.moe.dispatch import EinsumDispatcher, IndexDispatcher
from keras_layers.routing import top2_assignment


def random_case(seed, groups=3, tokens=10, experts=4, width=5, capacity=3, pad=True):
    rng = np.random.default_rng(seed)
    gates = tf.nn.softmax(rng.normal(size=(groups, tokens, experts)).astype("f4"))
    mask = tf.constant(rng.random((groups, tokens)) < 0.8) if pad else None
    uniforms = tf.constant(rng.random((groups, tokens)), tf.float32)
    routing = top2_assignment(gates, capacity, mask, uniforms)
    inputs = tf.constant(rng.normal(size=(groups, tokens, width)), tf.float32)
    outputs = rng.normal(size=(experts, groups, capacity, width))
    return routing, inputs, tf.constant(outputs, tf.float32)


@pytest.mark.parametrize("dispatcher", [IndexDispatcher(), EinsumDispatcher()])
def test_against_loops(dispatcher):
    for seed in range(5):
        routing, inputs, outputs = random_case(seed)
        buffers = np.zeros(outputs.shape, np.float32)
        combined = np.zeros(inputs.shape, np.float32)
        for g, s, k in zip(*np.nonzero(routing.dispatched.numpy()), strict=True):
            e, c = int(routing.expert_index[g, s, k]), int(routing.slot[g, s, k])
            buffers[e, g, c] = inputs[g, s]
            combined[g, s] += routing.weight[g, s, k] * outputs[e, g, c]
        np.testing.assert_allclose(
            dispatcher.dispatch(inputs, routing), buffers, atol=1e-6
        )
        np.testing.assert_allclose(
            dispatcher.combine(outputs, routing), combined, atol=1e-6
        )


# 300 tokens: numbers of choices above 256 need more than one base-256 digit.
@pytest.mark.parametrize("sizes", [{}, {"tokens": 300, "capacity": 100}])
def test_index_and_einsum_have_the_same_values_and_gradients(sizes):
    routing, inputs, _ = random_case(0, **sizes)
    scale = tf.constant(np.random.default_rng(1).normal(size=(4, 1, 1, 5)), tf.float32)
    results = []
    for dispatcher in (IndexDispatcher(), EinsumDispatcher()):
        with tf.GradientTape() as tape:
            tape.watch([inputs, routing.weight, scale])
            buffers = dispatcher.dispatch(inputs, routing)
            outputs = dispatcher.combine(tf.nn.gelu(buffers * scale), routing)
            loss = tf.reduce_sum(tf.sin(outputs))
        gradients = tape.gradient(loss, [inputs, routing.weight, scale])
        results.append([buffers, outputs, *gradients])
    for by_index, by_einsum in zip(*results, strict=True):
        assert np.any(by_einsum != 0)
        np.testing.assert_allclose(by_index, by_einsum, atol=2e-5)


@pytest.mark.parametrize("dispatcher", [IndexDispatcher(), EinsumDispatcher()])
def test_unknown_sizes(dispatcher):
    routing, inputs, outputs = random_case(2, pad=False)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, 5]),
            tf.TensorSpec([4, None, None, 5]),
            *(
                tf.TensorSpec([None, None, 2], x.dtype)
                for x in (routing.expert_index, routing.slot, routing.weight)
            ),
            tf.TensorSpec([None, None, 2], tf.bool),
            tf.TensorSpec([], tf.int32),
        ]
    )
    def run(inputs, outputs, expert_index, slot, weight, dispatched, capacity):
        unknown = routing._replace(
            expert_index=expert_index,
            slot=slot,
            weight=weight,
            dispatched=dispatched,
            capacity=capacity,
        )
        return (
            dispatcher.dispatch(inputs, unknown),
            dispatcher.combine(outputs, unknown),
        )

    buffers, combined = run(
        inputs, outputs, *routing[:4], tf.constant(routing.capacity)
    )
    np.testing.assert_allclose(buffers, dispatcher.dispatch(inputs, routing), atol=1e-6)
    np.testing.assert_allclose(
        combined, dispatcher.combine(outputs, routing), atol=1e-6
    )


def test_index_moves_activations_without_scatter_or_one_hot_tensors():
    routing, inputs, _ = random_case(0, tokens=64, width=48, capacity=32)

    def hlo_of(dispatcher):
        def step(inputs, expert_index, slot, weight, dispatched):
            moved = routing._replace(
                expert_index=expert_index,
                slot=slot,
                weight=weight,
                dispatched=dispatched,
            )
            with tf.GradientTape() as tape:
                tape.watch([inputs, weight])
                outputs = dispatcher.combine(dispatcher.dispatch(inputs, moved), moved)
                loss = tf.reduce_sum(tf.square(outputs))
            return tape.gradient(loss, [inputs, weight])

        compiled = tf.function(step, jit_compile=True)
        return compiled.experimental_get_compiler_ir(inputs, *routing[:4])(stage="hlo")

    by_index, by_einsum = hlo_of(IndexDispatcher()), hlo_of(EinsumDispatcher())
    assert " gather(" in by_index and " gather(" not in by_einsum
    assert " scatter(" not in by_index
    # The paper's [G, S, E, C], here of one's own shape or with E and C as one.
    assert "[3,64,4,32]" in by_einsum
    assert "[3,64,4,32]" not in by_index and "[3,64,128]" not in by_index


def test_an_infinite_token_stays_alone():
    routing, inputs, _ = random_case(0, pad=False)
    inputs = tf.tensor_scatter_nd_update(inputs, [[0, 4]], [[np.inf] * 5])
    dispatcher = IndexDispatcher()
    outputs = dispatcher.combine(dispatcher.dispatch(inputs, routing), routing)
    finite = np.isfinite(outputs.numpy()).all(axis=-1)
    finite[0, 4] = True
    assert finite.all()


def test_bfloat16_buffers():
    routing, inputs, _ = random_case(0)
    inputs = tf.cast(inputs, tf.bfloat16)
    results = []
    for dispatcher in (IndexDispatcher(), EinsumDispatcher()):
        with tf.GradientTape() as tape:
            tape.watch(routing.weight)
            buffers = dispatcher.dispatch(inputs, routing)
            outputs = dispatcher.combine(buffers, routing)
        assert buffers.dtype == outputs.dtype == tf.bfloat16
        gradient = tape.gradient(outputs, routing.weight)
        assert gradient.dtype == tf.float32
        results.append(tf.cast(outputs, tf.float32))
    np.testing.assert_allclose(*results, atol=0.05)
