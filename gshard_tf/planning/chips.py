"""Chips and topologies that can be planned for, with published figures.

Figures per chip are Google's own (cloud.google.com/tpu/docs, the page of each
version; bandwidths in decimal bytes). The interconnect of a link is the
stated bandwidth of the chip over its ports and both directions. The pages of v3 and v4
give none: v3 has 656 Gbit/s a link and direction (Jouppi et al., "A Domain-Specific
Supercomputer for Training Deep Neural Networks", CACM 2020), v4 50 GB/s (Jouppi et al.,
"TPU v4", ISCA 2023).
"""

import dataclasses
import difflib
import itertools
import math
import re
from typing import Any

from tensorflow.experimental import dtensor

from gshard_tf.runtime.core_order import order_cores
from gshard_tf.runtime.devices import cpu_devices, request_cpu_devices, topology_devices


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        name: The name that the TPU compiler uses.
        devices: The number of jax devices on it: 2 where the two cores are programmed
            separately (v3, tpu7x), 1 where they act as one.
        flops: FLOP/s of bfloat16 matmuls with float32 sums.
        hbm_bytes: Bytes of memory.
        hbm_bandwidth: Bytes per second to and from memory.
        link_bandwidth: Bytes per second of one link in one direction.
        dimensions: The dimensions of the torus that the links form.
        wraps_at: A dimension of a slice is a ring if its size is a multiple of this,
            else a line.
        slices: The slices that an error suggests for an unknown name.
    """

    name: str
    devices: int
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wraps_at: int
    slices: tuple[str, ...]


def _square(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{n}x{m}" for n in sizes for m in (n, 2 * n))


def _cubes(*sizes: int) -> tuple[str, ...]:
    return tuple(
        "x".join(map(str, s)) for s in itertools.combinations_with_replacement(sizes, 3)
    )


_TORUS = _cubes(2, 4, 8, 16)
_V5E = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", 2, 123e12, 32 * 2**30, 900e9, 82e9, 2, 32, _square(2, 4, 8, 16, 32)),
        Chip("v4", 1, 275e12, 32 * 2**30, 1228e9, 50e9, 3, 4, _TORUS),
        Chip("v5e", 1, 197e12, 16 * 2**30, 819e9, 50e9, 2, 16, _V5E),
        Chip("v5p", 1, 459e12, 95 * 2**30, 2765e9, 100e9, 3, 4, _TORUS),
        Chip("v6e", 1, 918e12, 32 * 2**30, 1638e9, 100e9, 2, 16, _V5E),
        Chip("tpu7x", 2, 2307e12, 192 * 2**30, 7380e9, 100e9, 3, 4, _TORUS),
    )
}  # fmt: skip


def is_ring(size: int, wraps_at: int | None) -> bool:
    """Returns whether a dimension's ends are linked; see `Chip.wraps_at`."""
    return wraps_at is not None and size > 2 and size % wraps_at == 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, or N virtual CPU devices (`chip` is None then).

    Attributes:
        name: The requested name.
        devices: jax devices, in their own order or in that of a mesh; those of a CPU
            exist.
        chip: The figures of each chip.
        shape: The number of chips along each dimension of the slice.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def hbm_bytes(self) -> float | None:
        """The memory of a device; None where it is the host's."""
        return None if self.chip is None else self.chip.hbm_bytes / self.chip.devices

    def in_order_of(self, mesh: dtensor.Mesh) -> "Topology":
        """Returns this slice, its devices in the order of a mesh's partitions."""
        devices = order_cores(self.devices, mesh.shape())
        return dataclasses.replace(self, devices=devices)


def find_topology(name: str) -> Topology:
    """Returns the topology of a name, `"v3:8x8"` or `"cpu:8"`.

    Raises:
        ValueError: for a name that the compiler does not know; the message suggests
            similar ones.
        ImportError: when the TPU compiler is not installed.
        RuntimeError: when jax has already started with fewer CPU devices.
    """
    cpus = re.fullmatch(r"cpu:(\d+)", name)
    if cpus and int(cpus[1]) > 0:
        count = int(cpus[1])
        request_cpu_devices(count)
        return Topology(name, cpu_devices(count), None, (count,))
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(_unknown(name))
    try:
        devices = topology_devices(name)
    except ValueError as error:
        raise ValueError(_unknown(name)) from error
    return Topology(name, devices, CHIPS[kind], tuple(int(n) for n in shape.split("x")))


def _unknown(name: str) -> str:
    kind, _, shape = name.partition(":")
    rule = (
        "`topology` must be a chip and its slice, such as 'v3:8x8' (64 chips, 128 "
        "cores), or 'cpu:8'"
    )
    received = f"Received: topology={name!r}"
    requested = math.prod(int(n) for n in re.findall(r"\d+", shape)) or 1

    def distance(candidate: str) -> float:
        size = math.prod(int(n) for n in candidate.split("x"))
        return abs(math.log(size / requested))

    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, [*CHIPS, "cpu"], n=1, cutoff=0.7)
        hint = f" Is it {near[0]}?" if near else ""
        chips = ", ".join(
            f"{chip.name}:{min(chip.slices, key=distance)}" for chip in CHIPS.values()
        )
        return f"{rule}. The chips, each with a slice: {chips}.{hint} {received}"
    nearest = ", ".join(
        f"{kind}:{n}" for n in sorted(CHIPS[kind].slices, key=distance)[:4]
    )
    return f"{rule}. The nearest that the compiler knows: {nearest}. {received}"
