"""Group-limited choice: a token's experts lie in few of the groups of experts."""

import tensorflow as tf

from keras_layers._arguments import check_choice, check_int
from keras_layers._shapes import static_shape
from keras_layers.routing.assignment import argmax, top_choices

SCORES = ("max", "top2")


def check_expert_groups(
    num_experts: int, k: int, groups: int, groups_per_token: int | None, score: str
) -> tuple[int, int]:
    """Raises ValueError unless K experts lie in the chosen groups, and scores exist.

    Returns:
        The number of groups, and of those that a token may use.
    """
    groups = check_int("num_expert_groups", groups, 1)
    groups_per_token = check_int(
        "expert_groups_per_token",
        groups if groups_per_token is None else groups_per_token,
        1,
    )
    check_choice("expert_group_score", score, SCORES)
    received = (
        f"num_experts={num_experts}, num_expert_groups={groups}, "
        f"expert_groups_per_token={groups_per_token}, k={k}, "
        f"expert_group_score={score!r}"
    )
    if num_experts % groups:
        raise ValueError(
            f"num_experts must be a multiple of num_expert_groups. Received: {received}"
        )
    size = num_experts // groups
    if groups_per_token > groups or groups_per_token * size < k:
        raise ValueError(
            "expert_groups_per_token must be at most num_expert_groups, and so many "
            f"groups must have k experts. Received: {received}"
        )
    if score == "top2" and size < 2 and groups_per_token < groups:
        raise ValueError(
            'Groups must have two experts or more for expert_group_score="top2". '
            f"Received: {received}"
        )
    return groups, groups_per_token


def within_best_groups(
    ranked: tf.Tensor, groups: int, groups_per_token: int, score: str
) -> tf.Tensor:
    """`ranked` `[G, S, E]`, with -inf for experts outside of a token's best groups.

    DeepSeek-V2 (arXiv 2405.04434, 2.2.2) and V3 (arXiv 2412.19437, 2.1.2): with the
    experts of a group on one device, or one node, a token is sent to few of them.

    Args:
        ranked: `[G, S, E]` float32, by which experts are chosen.
        groups: Number of groups, D, of E / D neighboring experts each.
        groups_per_token: Number of groups that a token may use.
        score: Score of a group: "max", its best expert's (V2), or "top2", the sum of
            its best two (V3).
    """
    shape = static_shape(ranked)
    size = shape[-1] // groups
    members = tf.reshape(ranked, [*shape[:-1], groups, size])  # [G, S, D, E / D]
    scores = tf.reduce_max(members, axis=-1)  # [G, S, D]
    if score == "top2":
        best = tf.one_hot(argmax(members), size, on_value=True, off_value=False)
        others = tf.where(best, -float("inf"), members)
        scores += tf.reduce_max(others, axis=-1)
    chosen = top_choices(scores, groups_per_token)
    chosen = tf.one_hot(chosen, groups, on_value=True, off_value=False)
    is_open = tf.reduce_any(chosen, axis=2)[..., None]  # [G, S, D, 1]
    return tf.reshape(tf.where(is_open, members, -float("inf")), shape)
