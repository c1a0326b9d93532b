"""`find_layout()`: the mesh and the rules that plans' estimates prefer."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.planning import planner
from gshard_tf.planning.chips import Chip, Topology, find_topology
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.roofline import Interconnect
from gshard_tf.planning.search.candidates import AXES, Candidate, Paths, candidates
from gshard_tf.planning.search.costs import Costs, Experience, costs_of
from gshard_tf.planning.search.layout_search import (
    FAILED,
    PLANNED,
    SKIPPED,
    LayoutSearch,
    Trial,
)
from gshard_tf.planning.search.survey import Survey
from gshard_tf.planning.units import seconds, size
from gshard_tf.sharding.mesh import create_mesh
from gshard_tf.spmd.keras_step import batch_specs, check_mode


def find_layout(
    model: keras.Model | Callable[[], keras.Model],
    topology: str,
    batch: Any = None,
    memory_limit: float | None = None,
    max_plans: int = 12,
    mode: str = "train",
    paths: Paths = (),
    cache: bool | str | os.PathLike = True,
    progress: Callable[[str], None] | None = None,
) -> LayoutSearch:
    """Finds a mesh and rules for a model on a slice, by the estimates of plans.

    Candidates are all meshes of the slice's cores, with the axes `data`, `seq`,
    `model` (`rows` and `columns` of images, `stage` of pipelines), and for each what
    may be split over them: the batch, experts, length, widths, heads, the vocabulary,
    a pipeline's layers; and weights (`fsdp`) or optimizer slots (`zero`) stored over
    `data`. Cheap analysis drops those that cannot be, that are like another, or whose
    variables alone are too large. The others are planned as `plan` does: first the
    paper's layout (tokens and experts over all cores), so that the result is never
    worse; then in the order of a prediction that learns from the plans before, until
    none that is left is expected to be faster.
    So the best is the best *of those planned*; `LayoutSearch.trials` says of each other
    one why it was not.

    A function of its own, because its result is not a `Plan`, and `mesh` and `rules`
    are what it finds.

    ```python
    found = gshard_tf.find_layout(build, "v5e:4x4", batch=((ids, ids), ids))
    print(found)
    print(found.python())  # to paste
    ```

    Args:
        model: As in `plan`. A function that creates the model is called once for each
            plan.
        topology: A slice of a TPU, as in `plan`. A CPU has no estimate of time.
        batch: As in `plan`: the *global* batch.
        memory_limit: Bytes per core that the step may need. None: what a core has.
            Choose less to leave room for what a plan does not know, such as a second
            program that stays in memory.
        max_plans: How many candidates are planned at most. More find more and take
            longer: seconds each for a small model, minutes for a large one.
        mode: `"train"`, `"evaluate"` or `"predict"`.
        paths: Names of the dimensions of weights, as in `AxisRules`. Without names, the
            weights of layers that are not from `keras_layers` are split by `fsdp` at
            most.
        cache: As in `plan`.
        progress: Called with what begins, a sentence.

    Returns:
        A `LayoutSearch`; `print` it, or read `best`, `plan` and `trials`.

    Raises:
        ValueError: as `plan`; for a CPU; for a `memory_limit` or `max_plans` that is
            not positive.
        ImportError: when libtpu is not installed.
    """
    check_mode(mode)
    if memory_limit is not None and not memory_limit > 0:
        raise ValueError(
            f"`memory_limit` must be positive. Received: memory_limit={memory_limit}"
        )
    if isinstance(max_plans, bool) or not isinstance(max_plans, int) or max_plans < 1:
        raise ValueError(
            "`max_plans` must be a whole number of at least 1. "
            f"Received: max_plans={max_plans!r}"
        )
    specs = batch_specs(batch)
    hardware = find_topology(topology)
    if hardware.chip is None or hardware.hbm_bytes is None:
        raise ValueError(
            "`topology` must be a slice of TPUs, such as 'v5e:4x4', whose plans "
            f"estimate times. Received: topology={topology!r}"
        )
    start = time.perf_counter()
    limit = hardware.hbm_bytes if memory_limit is None else memory_limit
    say = progress or (lambda text: None)
    say("building and tracing, to see what can be split ...")
    survey = Survey(model, specs, mode, paths)
    search = _Search(
        survey=survey,
        chip=hardware.chip,
        limit=limit,
        max_plans=max_plans,
        say=say,
        plan=lambda candidate: planner.plan(
            model,
            topology,
            candidate.mesh,
            candidate.axis_rules(paths),
            batch=specs,
            mode=mode,
            cache=cache,
        ),
    )
    search.prune(hardware)
    search.run()
    usual = [name for axis in AXES for name in axis.together + axis.each]
    return LayoutSearch(
        model=survey.model.name,
        mode=mode,
        topology=hardware.name,
        inputs=[
            f"{spec.dtype.name}[{','.join(map(str, spec.shape))}]"
            for spec in tf.nest.flatten(specs)
        ],
        memory_limit=limit,
        trials=sorted(search.trials, key=_rank),
        unused=sorted(set(usual) - survey.used),
        paths=tuple(paths),
        plan=search.best_plan,
        seconds=time.perf_counter() - start,
    )


def _rank(trial: Trial) -> tuple:
    fastest = math.inf if trial.seconds is None else trial.seconds
    needed = trial.bytes_needed or math.inf
    if trial.fits:
        return (0, fastest, needed)
    return ([PLANNED, FAILED, SKIPPED].index(trial.outcome) + 1, needed, fastest)


@dataclasses.dataclass
class _Search:
    """The state of a search: candidates that wait, and trials that have ended."""

    survey: Survey
    chip: Chip
    limit: float
    max_plans: int
    say: Callable[[str], None]
    plan: Callable[[Candidate], Plan]
    waiting: list[tuple[Candidate, Costs]] = dataclasses.field(default_factory=list)
    trials: list[Trial] = dataclasses.field(default_factory=list)
    experience: Experience = dataclasses.field(default_factory=Experience)
    best: float = math.inf
    best_plan: Plan | None = None

    def prune(self, hardware: Topology) -> None:
        """Fills `waiting` with the candidates that are worth a plan."""
        seen: dict[tuple, Candidate] = {}
        meshes: dict[tuple, tuple[dtensor.Mesh, Interconnect]] = {}
        for candidate in candidates(len(hardware.devices), self.survey.used):
            obstacle = self.survey.obstacle(candidate)
            if obstacle is not None:
                self._skip(candidate, None, "cannot be split so", obstacle)
                continue
            sizes = tuple(candidate.mesh.items())
            if sizes not in meshes:
                mesh = create_mesh(sizes, "TPU")
                links = Interconnect(hardware.in_order_of(mesh), self.chip)
                meshes[sizes] = mesh, links
            costs = costs_of(self.survey, candidate, *meshes[sizes])
            same = seen.setdefault(costs.layouts, candidate)
            if same is not candidate:
                self._skip(candidate, costs, "the same as another", f"{same}")
            elif costs.state_bytes > self.limit:
                self._skip(
                    candidate,
                    costs,
                    "variables alone exceed the limit",
                    f"{size(costs.state_bytes)} of {size(self.limit)}",
                )
            else:
                self.waiting.append((candidate, costs))

    def run(self) -> None:
        """Plans candidates in the order of the prediction, until none can be better."""
        planned = 0
        while self.waiting and planned < self.max_plans:
            self._drop_slower()
            if not self.waiting:
                break
            at = self._paper() if planned == 0 else None
            at = at or min(self.waiting, key=self._promise)
            self.waiting.remove(at)
            planned += 1
            self.say(
                f"plan {planned} of at most {self.max_plans}, {len(self.waiting)} "
                f"candidates left: {at[0]}"
            )
            self._try(*at)
        self._drop_slower()
        for candidate, costs in self.waiting:
            self._skip(
                candidate,
                costs,
                f"less promising than the {planned} planned (`max_plans`)",
                f"predicted: {seconds(self.experience.seconds(costs, self.chip))}, "
                f"{size(self.experience.memory(costs))}",
            )
        self.waiting = []

    def _paper(self) -> tuple[Candidate, Costs] | None:
        """The paper's layout, if it waits: tokens and experts over one axis of all."""
        plain = [
            each
            for each in self.waiting
            if list(each[0].mesh) == ["data"] and not (each[0].fsdp or each[0].zero)
        ]
        return max(plain, key=lambda each: len(each[0].rules), default=None)

    def _promise(self, each: tuple[Candidate, Costs]) -> tuple:
        candidate, costs = each
        memory = self.experience.memory(costs)
        time_ = self.experience.seconds(costs, self.chip)
        # Of those that hardly fit, the smallest first; of equals, the simplest.
        too_large = memory > self.limit
        return (
            too_large,
            memory if too_large else time_,
            time_,
            len(candidate.mesh),
            candidate.zero is not None or candidate.fsdp is not None,
        )

    def _drop_slower(self) -> None:
        """Drops what is not expected to be faster than the best found."""
        kept = []
        for candidate, costs in self.waiting:
            least = self.experience.at_least(costs, self.chip)
            if least < self.best:
                kept.append((candidate, costs))
                continue
            self._skip(
                candidate,
                costs,
                "slower by products, state and gradients alone",
                f"at least {seconds(least)}, and the best takes {seconds(self.best)}",
            )
        self.waiting = kept

    def _try(self, candidate: Candidate, costs: Costs) -> None:
        predicted = self.experience.seconds(costs, self.chip)
        try:
            plan = self.plan(candidate)
        except ValueError as error:
            if not self.trials_planned:
                raise  # not of this layout alone, as far as one can tell
            self.trials.append(
                Trial(
                    candidate,
                    FAILED,
                    "a plan is refused",
                    str(error),
                    state_bytes=costs.state_bytes,
                    predicted_seconds=predicted,
                )
            )
            return
        self.experience.learn(plan, costs)
        fits = plan.fits and plan.bytes_needed <= self.limit
        took = None if plan.time is None else plan.time.without_overlap
        self.trials.append(
            Trial(
                candidate,
                PLANNED,
                fits=fits,
                state_bytes=plan.state_bytes(per_core=True),
                bytes_needed=plan.bytes_needed,
                seconds=took,
                roofline=None if plan.time is None else plan.time.roofline,
                predicted_seconds=predicted,
                plan_key=plan.key,
            )
        )
        self.say(
            f"{'fits' if fits else 'does not fit'}: {size(plan.bytes_needed)}"
            + (f", {seconds(took)} a step" if took is not None else "")
        )
        if fits and took is not None and took < self.best:
            self.best, self.best_plan = took, plan

    @property
    def trials_planned(self) -> int:
        return sum(trial.outcome == PLANNED for trial in self.trials)

    def _skip(
        self, candidate: Candidate, costs: Costs | None, reason: str, detail: str
    ) -> None:
        self.trials.append(
            Trial(
                candidate,
                SKIPPED,
                reason,
                detail,
                state_bytes=None if costs is None else costs.state_bytes,
                predicted_seconds=(
                    None if costs is None else self.experience.seconds(costs, self.chip)
                ),
            )
        )
