"""Costs of a candidate before it is compiled: what is certain, and a prediction.

The prediction only says which candidate is planned first. What a search compares are
plans of compiled programs.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.hlo.collectives import Collective
from gshard_tf.planning.chips import Chip
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.roofline import Interconnect
from gshard_tf.planning.search.candidates import Candidate
from gshard_tf.planning.search.survey import Stored, Survey

_ITEM = 4  # bytes of an element of an activation
_CHOICES = 2  # experts of a token, as in the paper


@dataclasses.dataclass(frozen=True)
class Costs:
    """Facts of a candidate that need no compilation, per core.

    Attributes:
        state_bytes: Bytes of the variables: the program needs at least these.
        split: The number of parts that its activations are split into: its tokens, and
            the layers of a pipeline.
        products: Seconds of the products if all cores share all of them. A stage
            computes in bubbles, too.
        predicted_products: Seconds, if those of a layer are shared by the cores that
            split its tokens or its weights.
        links: Seconds of the gradients' sums and gathers.
        predicted_links: The same, and what activations are predicted to send.
        layouts: The layout of all variables, to tell that two candidates are the same.
    """

    state_bytes: int
    split: float
    products: float
    predicted_products: float
    links: float
    predicted_links: float
    layouts: tuple


@dataclasses.dataclass
class Experience:
    """Measures of the earlier plans of a search, which predict the next.

    Attributes:
        activations: Bytes of memory beyond the state, of all parts.
        accesses: Bytes accessed beyond the state, of all parts.
        flops_ratio: The least of `Plan.flops_ratio`, at most 1.
    """

    activations: float = 0.0
    accesses: float = 0.0
    flops_ratio: float = 1.0

    def learn(self, plan: Plan, costs: Costs) -> None:
        """Takes a plan into account."""
        beyond = max(plan.bytes_needed - costs.state_bytes, 0) * costs.split
        self.activations = min(self.activations or beyond, beyond)
        if plan.bytes_accessed is not None:
            accessed = plan.bytes_accessed - 2 * costs.state_bytes
            beyond = max(accessed, 0) * costs.split
            self.accesses = min(self.accesses or beyond, beyond)
        if plan.flops_ratio is not None:
            self.flops_ratio = min(self.flops_ratio, plan.flops_ratio)

    def memory(self, costs: Costs) -> float:
        """Returns the predicted bytes of a core."""
        return costs.state_bytes + self.activations / costs.split

    def seconds(self, costs: Costs, chip: Chip) -> float:
        """Returns the predicted time of a step."""
        accesses = 2 * costs.state_bytes + self.accesses / costs.split
        memory = accesses / (chip.hbm_bandwidth / chip.devices)
        return max(costs.predicted_products, memory) + costs.predicted_links

    def at_least(self, costs: Costs, chip: Chip) -> float:
        """Returns a time that the plan of a candidate is not expected to be below.

        The state is read once; all products are shared by all cores, without those
        that the compiler dropped in an earlier plan; gradients are summed.
        """
        memory = costs.state_bytes / (chip.hbm_bandwidth / chip.devices)
        return max(costs.products * self.flops_ratio, memory) + costs.links


def costs_of(
    survey: Survey,
    candidate: Candidate,
    mesh: dtensor.Mesh,
    interconnect: Interconnect,
) -> Costs:
    """Returns the costs of a candidate; `mesh` is the candidate's."""
    peak = interconnect.chip.flops / interconnect.chip.devices
    stored = survey.stored(candidate, mesh)
    mesh_sizes = candidate.mesh
    products = list(_products(survey, stored, candidate))
    links = _Links(candidate, interconnect)
    stages = candidate.splits(candidate.stage_axes())
    return Costs(
        state_bytes=sum(s.alike.count * s.bytes(s.storage, mesh_sizes) for s in stored),
        split=candidate.splits(candidate.token_axes())
        * (stages / survey.bubble_factor(candidate)),
        products=sum(flops for flops, _ in products)
        / (math.prod(mesh_sizes.values()) * peak),
        predicted_products=sum(f / candidate.splits(axes) for f, axes in products)
        / peak,
        # Of the least: what is summed may travel in bfloat16, and once.
        links=_sums(survey, stored, candidate, links, once=True) / 2,
        predicted_links=_sums(survey, stored, candidate, links)
        + _activations(survey, stored, candidate, links)
        + _shifts(survey, candidate, links),
        layouts=(
            tuple(mesh_sizes.items()),
            tuple((s.storage, s.compute) for s in stored),
            frozenset(
                tuple(candidate.rules.get(name or "") for name in axes)
                for axes in survey.named
            ),
        ),
    )


class _Links:
    """The times of collectives over axes of a candidate's mesh."""

    def __init__(self, candidate: Candidate, interconnect: Interconnect):
        self.sizes = candidate.mesh
        self.interconnect = interconnect

    def seconds(self, kind: str, bytes_: float, axes: Collection[str]) -> float:
        """Returns the time of one that brings each device `bytes_`."""
        names = list(self.sizes)
        over = [names.index(axis) for axis in names if axis in axes]
        if not over:
            return 0.0
        ids = np.arange(math.prod(self.sizes.values()))
        ids = ids.reshape(list(self.sizes.values()))
        ids = np.moveaxis(ids, over, range(-len(over), 0))
        size = math.prod(self.sizes[names[d]] for d in over)
        groups = ids.reshape(-1, size)
        pairs = np.stack([groups[:, :-1].ravel(), groups[:, 1:].ravel()], axis=1)
        return self.interconnect.seconds(
            Collective(kind, (), int(bytes_), "", groups=groups, pairs=pairs)
        )


def _sums(
    survey: Survey,
    stored: list[Stored],
    candidate: Candidate,
    links: _Links,
    once: bool = False,
) -> float:
    """Returns the time to sum the gradients, and to gather weights stored in parts.

    Those of a pipeline's layers are added up on a core, and summed at the end, unless
    each core stores a part of the sum: then in each tick, if not `once`.
    """
    tokens = candidate.token_axes()
    ticks = 1.0 if once else _ticks(survey, candidate)
    seconds = 0.0
    for each in stored:
        alike, mesh = each.alike, candidate.mesh
        if alike.role not in ("weight", "frozen"):
            continue
        whole = each.bytes(each.compute, mesh)
        gathered = set(each.storage) - set(each.compute)
        of_one = links.seconds("all-gather", whole, [a for a in gathered if a])
        if alike.is_trained and survey.mode == "train":
            over = [axis for axis in tokens if axis not in each.compute]
            summed = links.seconds("all-reduce", whole, over)
            if gathered:
                # Each core needs its own part of the sum.
                summed *= (ticks if alike.is_staged else 1) / 2
            of_one += summed
        seconds += alike.count * of_one
    return seconds


def _ticks(survey: Survey, candidate: Candidate) -> float:
    """Returns the ticks of a pipeline's pass; 1 where there is none."""
    count = min(survey.microbatches, default=1)
    return count * survey.bubble_factor(candidate)


def _products(
    survey: Survey, stored: list[Stored], candidate: Candidate
) -> Iterator[tuple[float, set[str]]]:
    """Yields the FLOPs of each layer, and the mesh axes whose cores share them."""
    tokens = set(candidate.token_axes())
    by_layer: dict[str, set[str]] = {}
    staged: set[str] = set()
    for each in stored:
        if each.alike.role in ("weight", "frozen"):
            axes = {axis for axis in each.compute if axis is not None}
            for layer in each.alike.layers:
                by_layer.setdefault(layer, set()).update(axes)
            if each.alike.is_staged:
                staged.update(each.alike.layers)
    for layer, flops in survey.flops.items():
        below = {n for n in by_layer if f"{n}/".startswith(f"{layer}/")}
        # What is around a pipeline is split by weights of its own.
        around = below - staged
        bubbles = survey.bubble_factor(candidate) if below and not around else 1.0
        yield flops * bubbles, tokens.union(*(by_layer[n] for n in around or below))


def _activations(
    survey: Survey, stored: list[Stored], candidate: Candidate, links: _Links
) -> float:
    """Returns the time of what is sent for tokens, by the usual collectives.

    Of each weight that is split over an axis that splits no tokens, one sum of its
    inputs' gradients or of its outputs; of experts among the tokens' cores, two
    exchanges of their inputs or outputs; of attention over a split length, one gather
    of keys or values, or of their gradients.
    """
    tokens = candidate.token_axes()
    rows = survey.tokens / candidate.splits(tokens)
    forward_only = 0.5 if survey.mode != "train" else 1.0
    seconds = 0.0
    for each in stored:
        alike = each.alike
        if alike.role not in ("weight", "frozen"):
            continue
        repeats: float = alike.repeats
        shape = alike.shape[1:] if alike.is_stacked else alike.shape
        if len(shape) < 2:
            continue
        over = {axis for axis in each.compute if axis is not None}
        if alike.is_staged:
            stages = candidate.stage_axes()
            over -= set(stages)
            # A core has the layers of its stage, and computes in bubbles.
            repeats *= survey.bubble_factor(candidate) / candidate.splits(stages)
        size = rows * _ITEM * (alike.width or min(shape[-2:]))
        once = links.seconds("all-reduce", size, over - set(tokens))
        if "expert" in alike.axes:
            exchanged = over & set(tokens)
            once += 2 * links.seconds("all-to-all", _CHOICES * size, exchanged)
        if "heads" in alike.axes and "length" in candidate.rules:
            axis = candidate.rules["length"]
            kept = size * candidate.mesh[axis]
            once += links.seconds("all-gather", kept, [axis])
        seconds += alike.count * repeats * once * forward_only
    return seconds


def _shifts(survey: Survey, candidate: Candidate, links: _Links) -> float:
    """Returns the time of pipelines: a shift in each tick, and a sum of the outputs.

    And as much for the gradient.
    """
    stages = candidate.stage_axes()
    if not stages or not survey.microbatches:
        return 0.0
    width = max((v.width for v in survey.variables if v.is_staged), default=0)
    size = survey.tokens / candidate.splits(candidate.token_axes()) * _ITEM * width
    shift = links.seconds("collective-permute", size / min(survey.microbatches), stages)
    once = _ticks(survey, candidate) * shift + links.seconds("all-reduce", size, stages)
    return len(survey.microbatches) * once * (2 if survey.mode == "train" else 1)
