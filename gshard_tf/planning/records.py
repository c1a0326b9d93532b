"""The records that a plan consists of: plain data, as its JSON has them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Weight:
    """One variable.

    Attributes:
        path: Its Keras path.
        role: "weight", "frozen" (no gradient), "optimizer" or "other" (metrics, seeds).
        shape: Its global shape.
        dtype: Its dtype.
        layout: The mesh axis, or None, of each dimension.
        bytes: The global size.
        bytes_per_core: The size of the shard of each core.
        rule: The rule that decided the layout.
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
        outputs: Results that do not reuse the memory of arguments.
        temporaries: Memory within the step, most of it activations.
        code: The program itself.
        capacity: The memory of the core; None where it is the host's.
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
    """The reason why a program does not fit.

    Attributes:
        needed: Bytes per core that the program needs.
        capacity: Bytes per core that are available.
        buffers: The largest buffers.
        message: The compiler's message.
        as_written: Whether the compiler named no buffers, and `buffers` are the
            largest tensors of the step before it is split over cores.
    """

    needed: float
    capacity: float
    buffers: list[Buffer]
    message: str
    as_written: bool = False


@dataclasses.dataclass(frozen=True)
class Communication:
    """The collectives of one kind, layer and mesh axis.

    XLA combines small collectives, as the sums of all gradients. Bytes and time of such
    a one are divided among the layers whose tensors it moves.

    Attributes:
        kind: Such as "all-to-all".
        layer: The layer that they belong to, or "".
        axis: The mesh axes over which devices communicate, joined by "+".
        count: How many run in a step; those of a loop once per iteration, or once if
            the number of iterations depends on values (`Plan.complaints` names it).
            One of several layers counts once, in that with most of its bytes.
        bytes: The bytes that a core receives for this layer.
        seconds: The part of the bytes in the time of all of them, by the roofline.
        asked: Whether annotations imply it; sums of partial results (all-reduce,
            reduce-scatter) always count as implied.
        shared: How many more carry a part for this layer, and count in another one.
    """

    kind: str
    layer: str
    axis: str
    count: int
    bytes: int
    seconds: float
    asked: bool
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline of stages, which microbatches pass through.

    Attributes:
        name: The layer's.
        stages: P.
        microbatches: K.
    """

    name: str
    stages: int
    microbatches: int

    @property
    def bubble(self) -> float:
        """The share of a stage's time in which it has no microbatch.

        It computes all the same, so that `flops` has it.
        """
        return (self.stages - 1) / (self.microbatches + self.stages - 1)


@dataclasses.dataclass(frozen=True)
class Reshard:
    """A change of layout that no annotation implies.

    Attributes:
        kind: The collective.
        layer: The layer that it happens in.
        operation: The operation that needed the other layout.
        shape: The array that each core receives, as `f32[8,128]`.
        axis: The mesh axes.
        count: How many run in a step.
        bytes: The bytes that a core receives by all of them.
        advice: The annotation that would remove it.
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
    """The estimated time of a step.

    Attributes:
        compute: Seconds for matmuls and convolutions at the chip's peak.
        hbm: Seconds for the bytes that the compiler counts as accessed.
        interconnect: Seconds for the collectives.
        compiler: The compiler's own estimate; None where it is absurd or not given.
        assumptions: The assumptions behind the figures, in sentences.
    """

    compute: float
    hbm: float
    interconnect: float
    compiler: float | None
    assumptions: list[str]

    @property
    def roofline(self) -> float:
        """The lower bound: the longest of the three."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def without_overlap(self) -> float:
        """The time if communication and computation never overlapped."""
        return max(self.compute, self.hbm) + self.interconnect
