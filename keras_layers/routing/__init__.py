"""Routers: which token goes to which expert, into which slot, with which weight.

A router is a `Router` layer: scores of tokens become a `Routing` (tokens choose
experts) or a `SlotRouting` (experts choose tokens). It knows nothing of how tokens are
moved (`dispatch.py`) or of what experts compute (`moe.py`), so another way to choose is
one more layer of this kind.
"""

from keras_layers.routing.capacity import expert_capacity
from keras_layers.routing.expert_choice import ExpertChoiceRouter
from keras_layers.routing.hash_router import HashRouter
from keras_layers.routing.losses import load_balancing_loss, router_z_loss
from keras_layers.routing.recording import record_routing, replay_routing
from keras_layers.routing.results import Routing, SlotRouting
from keras_layers.routing.router import Router, RouterReport
from keras_layers.routing.top2 import Top2Router, top2_assignment
from keras_layers.routing.top_k import TopKRouter

#: Names by which `MoELayer(router={"kind": name, ...})` finds them.
ROUTERS = {
    "top2": Top2Router,
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
}

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "HashRouter",
    "Router",
    "RouterReport",
    "Routing",
    "SlotRouting",
    "Top2Router",
    "TopKRouter",
    "expert_capacity",
    "load_balancing_loss",
    "record_routing",
    "replay_routing",
    "router_z_loss",
    "top2_assignment",
]
