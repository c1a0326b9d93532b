"""Routers: which token goes to which expert, into which slot, with which weight.

A router is a `Router` layer: scores of tokens become a `TokenChoiceRouting` (tokens
choose experts) or an `ExpertChoiceRouting` (experts choose tokens). It does not depend
on how tokens move (`moe/dispatch.py`) or on the experts (`moe/experts.py`), so another
rule of choice is one more layer of this kind.
"""

from keras_layers.routing.capacity import expert_capacity
from keras_layers.routing.expert_choice import ExpertChoiceRouter
from keras_layers.routing.hash_router import HashRouter
from keras_layers.routing.losses import load_balancing_loss, router_z_loss
from keras_layers.routing.recording import record_routing, replay_routing
from keras_layers.routing.router import Router, RouterStats
from keras_layers.routing.routing import (
    ExpertChoiceRouting,
    Routing,
    TokenChoiceRouting,
)
from keras_layers.routing.top2 import Top2Router, top2_assignment
from keras_layers.routing.top_k import TopKRouter

#: Kinds of router, as in `MoELayer(router={"kind": "top2"})`.
ROUTERS: dict[str, type[Router]] = {
    "top2": Top2Router,
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
}

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "ExpertChoiceRouting",
    "HashRouter",
    "Router",
    "RouterStats",
    "Routing",
    "TokenChoiceRouting",
    "Top2Router",
    "TopKRouter",
    "expert_capacity",
    "load_balancing_loss",
    "record_routing",
    "replay_routing",
    "router_z_loss",
    "top2_assignment",
]
