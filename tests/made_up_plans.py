"""`find_layout` on a slice of four cores, whose plans are made up, not compiled."""

import dataclasses
import itertools

import keras
import plan_samples
import tensorflow as tf

import gshard_tf
from gshard_tf.planning import planner
from gshard_tf.planning.chips import CHIPS, Topology
from gshard_tf.planning.records import StepTime
from gshard_tf.planning.search import find_layout

LENGTH = 16


@dataclasses.dataclass
class Core:
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0


def topology():
    """A v5e:2x2, of which nothing needs libtpu but to compile."""
    devices = [Core((x, y, 0)) for y, x in itertools.product(range(2), repeat=2)]
    return Topology("v5e:2x2", devices, CHIPS["v5e"], (2, 2))


class Planner:
    """Stands for `plan`: memory and time by a function of the layout."""

    def __init__(self, figures):
        self.figures = figures
        self.asked = []

    def __call__(self, model, topology, mesh, rules, **options):
        del model, topology, options
        self.asked.append((dict(mesh), dict(rules.rules), rules.fsdp, rules.zero))
        needed, seconds = self.figures(mesh, rules)
        made = plan_samples.moe()
        memory = dataclasses.replace(
            made.memory, arguments=needed, outputs=0, temporaries=0, code=0
        )
        return dataclasses.replace(
            made,
            memory=memory,
            weights=[],
            bytes_accessed=0.0,
            flops=1.0,
            flops_as_written=1.0,
            time=StepTime(seconds, 0.0, 0.0, None, []),
            key=str(len(self.asked)),
        )


def model_of(layer, width):
    inputs = keras.Input((LENGTH, width))
    model = keras.Model(inputs, layer()(inputs), name="small")
    model.compile("adam", "mse")
    return model


def search(monkeypatch, layer, width, rows, figures=None, **options):
    """A search whose plans are made up, and the layouts that were planned."""
    plans = Planner(figures or (lambda mesh, rules: (1_000, 1.0)))
    monkeypatch.setattr(planner, "plan", plans)
    monkeypatch.setattr(find_layout, "find_topology", lambda name: topology())
    x = tf.TensorSpec([rows, LENGTH, width], tf.float32)
    found = gshard_tf.find_layout(
        lambda: model_of(layer, width), "v5e:2x2", (x, x), **options
    )
    return found, plans.asked
