"""Lower bounds on step time: matmuls, memory accesses, communication."""

import math

import numpy as np

from gshard_tf.hlo.collectives import Collective
from gshard_tf.planning.chips import Chip, Topology, is_ring
from gshard_tf.planning.records import StepTime


class Interconnect:
    """The links of a slice, and lower bounds on the time of collectives on them.

    Chips form a grid; a dimension is a ring if its size is a multiple of
    `Chip.wraps_at`, else a line. Traffic along a dimension is spread evenly over its
    links. The cores of a chip share its links.

    Args:
        topology: A slice with its devices in the order of the program's partitions.
        chip: The figures of each chip.
    """

    def __init__(self, topology: Topology, chip: Chip):
        self.chip = chip
        # The coordinates of each core's chip: [cores, dimensions].
        self.coords = np.array(
            [d.coords[: len(topology.shape)] for d in topology.devices]
        )
        self.shape = topology.shape

    def seconds(self, collective: Collective) -> float:
        """Returns a lower bound on the seconds of one run of `collective`."""
        if collective.kind == "collective-permute":
            return self._permute(collective)
        if collective.groups is None or collective.groups.shape[-1] < 2:
            return 0.0
        # All groups have the same shape, so the first represents them.
        places = self.coords[collective.groups[0]]
        spans = [len(np.unique(places[:, d])) for d in range(places.shape[1])]
        members = len(collective.groups[0])
        chips = len(np.unique(places, axis=0))
        if chips < 2:
            return 0.0
        sharing = members / chips  # cores of the group on one chip
        size = collective.bytes * sharing
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            return max(self._exchange(d, n, size) for d, n in enumerate(spans) if n > 1)
        # Sums and gathers use all dimensions at once.
        links = sum(
            (2 if self._is_ring(d, n) else 1) for d, n in enumerate(spans) if n > 1
        )
        moved = {
            "all-gather": collective.bytes,
            "reduce-scatter": collective.bytes * members,
            "all-reduce": 2 * collective.bytes,
        }[collective.kind]
        return moved * (chips - 1) / chips / (links * self.chip.link_bandwidth)

    def _exchange(self, dimension: int, length: int, size: float) -> float:
        # Half of what the chips of a line hold crosses its middle, half of that in
        # each direction, by one link; a ring has two middles.
        middles = 2 if self._is_ring(dimension, length) else 1
        return size * length / 4 / middles / self.chip.link_bandwidth

    def _permute(self, collective: Collective) -> float:
        if collective.pairs is None or not len(collective.pairs):
            return 0.0
        from_, to = (self.coords[collective.pairs[:, i]] for i in (0, 1))
        moving = np.any(from_ != to, axis=1)
        return collective.bytes / self.chip.link_bandwidth if moving.any() else 0.0

    def _is_ring(self, dimension: int, length: int) -> bool:
        whole = self.shape[dimension]
        return length == whole and is_ring(whole, self.chip.wraps_at)


def step_time(
    topology: Topology,
    chip: Chip,
    flops: float,
    bytes_accessed: float,
    interconnect: float,
    compiler_seconds: float | None,
) -> StepTime:
    """Returns the estimated time of a step, with its assumptions.

    `interconnect` is the time of its collectives (`Interconnect.seconds`), each as
    often as it runs.
    """
    compute = flops / (chip.flops / chip.devices)
    if compiler_seconds is not None and not (
        math.isfinite(compiler_seconds) and compiler_seconds >= compute / 2
    ):
        compiler_seconds = None  # it comes back negative, or below what is possible
    rings = [n for n in topology.shape if is_ring(n, chip.wraps_at)]
    return StepTime(
        compute=compute,
        hbm=bytes_accessed / (chip.hbm_bandwidth / chip.devices),
        interconnect=interconnect,
        compiler=compiler_seconds,
        assumptions=[
            f"Matmuls at the chip's peak of {chip.flops / 1e12:.0f} TFLOP/s in "
            "bfloat16, also where the step is in float32 (TPUs multiply float32 in "
            "one bfloat16 pass unless told otherwise).",
            f"Memory at {chip.hbm_bandwidth / 1e9:.0f} GB/s a chip; the bytes are the "
            "compiler's own count, which takes on-chip buffers for memory.",
            f"Links at {chip.link_bandwidth / 1e9:.0f} GB/s in each direction, "
            + (
                f"rings along dimensions of {rings[0]}, lines along others"
                if rings
                else "lines, not rings, along each dimension"
            )
            + "; no latency, no contention between collectives.",
            "No input pipeline, no host, no launch cost.",
        ],
    )
