"""Arguments of `MoELayer` for layers like those of published models."""

from collections.abc import Mapping
from typing import Any

from keras_layers._arguments import check_choice
from keras_layers.routing.capacity import DROPLESS

_SHARED = {"dispatcher": DROPLESS, "activation": "silu", "gated": True}

#: By convention: the layer's arguments, the router's among them.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **_SHARED,
        "router": {"kind": "top_k", "k": 2},
        "aux_loss_coef": 0.001,
    },
    "qwen2_moe": {
        **_SHARED,
        "router": {"kind": "top_k", "k": 4, "normalize_weights": False},
        "num_shared_experts": 4,
        "shared_expert_gate": True,
        "aux_loss_coef": 0.001,
    },
    "qwen3_moe": {
        **_SHARED,
        "router": {"kind": "top_k", "k": 8, "normalize_weights": True},
        "aux_loss_coef": 0.001,
    },
    "deepseek_v2": {
        **_SHARED,
        "router": {
            "kind": "top_k",
            "k": 6,
            "normalize_weights": False,
            "weight_scale": 16.0,
            "num_expert_groups": 8,
            "expert_groups_per_token": 3,
        },
        "num_shared_experts": 2,
        "aux_loss_coef": 0.001,
    },
    "deepseek_v3": {
        **_SHARED,
        "router": {
            "kind": "top_k",
            "k": 8,
            "scores": "sigmoid",
            "bias_update_rate": 0.001,
            "weight_scale": 2.5,
            "num_expert_groups": 8,
            "expert_groups_per_token": 4,
            "expert_group_score": "top2",
        },
        "num_shared_experts": 1,
        "aux_loss_coef": 0.0001,
    },
}


def arguments_as_in(convention: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MoELayer`: those of a convention, but for those that are given.

    Of a router that is given as a dict, each argument goes before the convention's.
    """
    check_choice("convention", convention, tuple(CONVENTIONS))
    merged = {**CONVENTIONS[convention], **arguments}
    router = merged["router"]
    if isinstance(router, Mapping):
        merged["router"] = {**CONVENTIONS[convention]["router"], **router}
    return merged
