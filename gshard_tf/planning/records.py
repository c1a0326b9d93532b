"""The records that a plan consists of: plain data, as its JSON has them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Weight:
    """One variable.

    Attributes:
        path: Its Keras path.
        role: "weight", "frozen" (no gradient), "optimizer" or "other" (metrics, seeds).
        shape: Its whole shape.
        dtype: Its dtype.
        layout: Mesh axis, or None, of each dimension.
        bytes: Of the whole.
        bytes_per_core: Of what each core holds.
        rule: What decided the layout.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: tuple[str | None, ...]
    bytes: int
    bytes_per_core: int
    rule: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of memory per core that the compiled step needs at once.

    Attributes:
        arguments: State and batch.
        outputs: Results that do not take the place of arguments.
        temporaries: What lives within the step, most of it activations.
        code: The program itself.
        capacity: What the core has; None where it is the host's.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    capacity: float | None

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large buffer of a program that does not fit."""

    bytes: int
    shape: str
    layer: str
    operation: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Why the compiler gave up.

    Attributes:
        needed: Bytes per core that it wanted.
        capacity: Bytes per core that there are for it.
        buffers: The largest, if it named them.
        message: What it said.
        as_written: Whether it named none, and `buffers` are the largest tensors of the
            step as it is written: whole, before they are split over cores.
    """

    needed: float
    capacity: float
    buffers: list[Buffer]
    message: str
    as_written: bool = False


@dataclasses.dataclass(frozen=True)
class Communication:
    """Collectives that are alike.

    Attributes:
        kind: Such as "all-to-all".
        layer: The layer that they belong to, or "".
        axis: The mesh axes over which devices communicate, joined by "+".
        count: How many run in a step; those of a loop as often as it turns, or once
            where that depends on values (`Plan.complaints` then says so).
        bytes: What a core receives by all of them.
        seconds: By the roofline.
        asked: Whether annotations ask for it; sums of partial results (all-reduce,
            reduce-scatter) always count as asked for.
    """

    kind: str
    layer: str
    axis: str
    count: int
    bytes: int
    seconds: float
    asked: bool


@dataclasses.dataclass(frozen=True)
class Reshard:
    """A change of layout that no annotation asks for.

    Attributes:
        kind: The collective.
        layer: Where it happens.
        operation: The operation that wanted the other layout.
        shape: What each core receives, as `f32[8,128]`.
        axis: The mesh axes.
        count: How many run in a step.
        bytes: What a core receives by all of them.
        advice: Which annotation would remove it.
    """

    kind: str
    layer: str
    operation: str
    shape: str
    axis: str
    count: int
    bytes: int
    advice: str


@dataclasses.dataclass(frozen=True)
class StepTime:
    """An estimate, not a measurement.

    Attributes:
        compute: Seconds for the products at the chip's peak.
        hbm: Seconds for the bytes that the compiler says are accessed.
        interconnect: Seconds for the collectives.
        compiler: The compiler's own estimate; None where it is absurd or not given.
        assumptions: What the figures rest on, in sentences.
    """

    compute: float
    hbm: float
    interconnect: float
    compiler: float | None
    assumptions: list[str]

    @property
    def roofline(self) -> float:
        """No step is faster: whichever of the three takes longest."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def without_overlap(self) -> float:
        """If communication waited for computation and the other way round."""
        return max(self.compute, self.hbm) + self.interconnect
