"""Choices within groups of experts, against a slow router."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import routers as oracle
from routings import check, logits_of

from keras_layers import TopKRouter


@settings(max_examples=20)
@given(
    groups=st.integers(1, 4),
    size=st.integers(2, 4),
    allowed=st.integers(1, 4),
    score=st.sampled_from(["max", "top2"]),
    biased=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_groups_of_experts(groups, size, allowed, score, biased, ties, seed):
    experts, allowed = groups * size, min(allowed, groups)
    router = TopKRouter(
        experts,
        2,
        scores="sigmoid",
        score_bias=biased,
        weight_scale=2.5,
        num_expert_groups=groups,
        expert_groups_per_token=allowed,
        expert_group_score=score,
    )
    router.build((None, None, 3))
    bias = np.zeros(experts, np.float32)
    if biased:
        bias = np.random.default_rng(seed).normal(size=experts).astype(np.float32)
        router.bias.assign(bias)
    logits = logits_of(seed, 3, 7, experts, ties)
    routing, _, _ = router.route(tf.constant(logits), 7, None, True)
    if biased:
        np.testing.assert_array_equal(router.bias, bias)  # without a rate it stays
    values = tf.sigmoid(logits).numpy()
    best = {"max": 1, "top2": 2}[score]
    check(
        routing,
        [
            [
                (s, e, slot, 2.5 * weight)
                for s, e, slot, weight in oracle.top_k(
                    values[g],
                    oracle.within_groups(values[g] + bias, groups, allowed, best),
                    2,
                    7,
                    real=np.ones(7, bool),
                    normalize=True,
                    prioritized=False,
                )
            ]
            for g in range(3)
        ],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert_groups": 3}, "must be a multiple of num_expert_groups"),
        ({"num_expert_groups": 2, "expert_groups_per_token": 3}, "at most num_expert"),
        ({"num_expert_groups": 8, "expert_groups_per_token": 1}, "must have k experts"),
        (
            {
                "num_expert_groups": 8,
                "expert_groups_per_token": 2,
                "expert_group_score": "top2",
            },
            "two experts or more",
        ),
        ({"num_expert_groups": 2, "masked_experts": [1]}, "masked_experts must be"),
    ],
)
def test_groups_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(8, 2, **options)
