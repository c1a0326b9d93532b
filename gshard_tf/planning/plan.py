"""`Plan`: the result of planning, as attributes, a table, and JSON."""

import dataclasses
import json
from typing import Any

from gshard_tf.planning.records import (
    Buffer,
    Communication,
    Memory,
    OutOfMemory,
    Pipeline,
    Reshard,
    StepTime,
    Weight,
)
from gshard_tf.planning.text import table

#: Increased when the fields or their definitions change, so that an old file is
#: rejected and not misread.
FORMAT = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, FLOPs and communication of a step on a mesh that need not exist.

    Attributes:
        model: The name of the model.
        mode: "train", "evaluate" or "predict".
        topology: Such as "v3:8x8".
        chip: The figures of a chip, the fields of `Chip`; None on a CPU.
        slice_shape: The number of chips along each dimension.
        mesh: Axes and their sizes.
        rules: Logical axis -> mesh axis.
        inputs: dtype and shape of each tensor of the batch.
        weights: All variables.
        memory: The memory of a core; None if the step does not fit.
        out_of_memory: The reason why it does not fit; None if it does.
        flops: FLOPs of the compiled matmuls and convolutions, per core.
        flops_as_written: FLOPs of the step before partitioning, divided by the cores;
            of manual regions, which are written for one core, all.
        flops_by_layer: `flops` by layer.
        bytes_accessed: Bytes accessed per core, as the compiler counts them.
        communication: Collectives by kind, layer and axis.
        reshards: Layout changes that no annotation implies.
        time: The estimate; None on a CPU or if it does not fit.
        complaints: Warnings: loops that cannot be counted, rules that match nothing,
            large weights that no rule names.
        advice: Suggestions for a step that does not fit.
        trace_seconds: The time to trace and lower the step.
        compile_seconds: The time to partition and compile it.
        host_bytes: The largest resident size of this process so far.
        versions: The versions of the packages involved.
        key: A hash that identifies the plan's content.
        pipelines: The pipelines of the step.
    """

    model: str
    mode: str
    topology: str
    chip: dict[str, Any] | None
    slice_shape: tuple[int, ...]
    mesh: dict[str, int]
    rules: dict[str, str | None]
    inputs: list[str]
    weights: list[Weight]
    memory: Memory | None
    out_of_memory: OutOfMemory | None
    flops: float | None
    flops_as_written: float
    flops_by_layer: dict[str, float]
    bytes_accessed: float | None
    communication: list[Communication]
    reshards: list[Reshard]
    time: StepTime | None
    complaints: list[str]
    advice: list[str]
    trace_seconds: float
    compile_seconds: float
    host_bytes: int
    versions: dict[str, str]
    key: str
    pipelines: list[Pipeline] = dataclasses.field(default_factory=list)

    @property
    def num_devices(self) -> int:
        """The number of cores."""
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    @property
    def fits(self) -> bool:
        """True if the program fits into the memory of a core."""
        return self.out_of_memory is None

    @property
    def bytes_needed(self) -> float:
        """Bytes per core that the program needs, whether it fits or not."""
        if self.out_of_memory is not None:
            return self.out_of_memory.needed
        return self.memory.total if self.memory else 0

    @property
    def bytes_available(self) -> float | None:
        """Bytes per core that are available; None where they are the host's."""
        if self.out_of_memory is not None:
            return self.out_of_memory.capacity
        return self.memory.capacity if self.memory else None

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        parameters = 0
        for weight in self.weights:
            if weight.role in ("weight", "frozen"):
                count = 1
                for size in weight.shape:
                    count *= size
                parameters += count
        return parameters

    @property
    def flops_ratio(self) -> float | None:
        """Compiled FLOPs over those as written: at 1.05, 5 percent are wasted."""
        if self.flops is None or not self.flops_as_written:
            return None
        return self.flops / self.flops_as_written

    def state_bytes(self, *roles: str, per_core: bool = False) -> int:
        """Returns the bytes of the variables of some roles, by default of all."""
        return sum(
            w.bytes_per_core if per_core else w.bytes
            for w in self.weights
            if not roles or w.role in roles
        )

    def count(self, kind: str, layer: str = "") -> int:
        """Returns how many collectives of a kind count in a layer and those within it.

        `Communication.count` says where one of several layers counts.
        """
        return sum(
            c.count
            for c in self.communication
            if c.kind == kind and f"{c.layer}/".startswith(f"{layer}/" if layer else "")
        )

    def to_json(self) -> str:
        """Returns the plan as one JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Returns the plan that `to_json` wrote.

        Raises:
            ValueError: when the text is not a plan, or one of another format.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The text must be the JSON of a plan: {error}. Received: {text[:80]!r}"
            ) from error
        format_ = fields.pop("format", None) if isinstance(fields, dict) else None
        if format_ != FORMAT:
            raise ValueError(
                f"The plan must be of format {FORMAT}; make it again with this "
                f"version. Received: format={format_!r}"
            )
        fields["slice_shape"] = tuple(fields["slice_shape"])
        fields["weights"] = [
            Weight(**{**w, "shape": tuple(w["shape"]), "layout": tuple(w["layout"])})
            for w in fields["weights"]
        ]
        if fields["memory"] is not None:
            fields["memory"] = Memory(**fields["memory"])
        if fields["out_of_memory"] is not None:
            oom = fields["out_of_memory"]
            oom["buffers"] = [Buffer(**b) for b in oom["buffers"]]
            fields["out_of_memory"] = OutOfMemory(**oom)
        fields["communication"] = [Communication(**c) for c in fields["communication"]]
        fields["pipelines"] = [Pipeline(**p) for p in fields["pipelines"]]
        fields["reshards"] = [Reshard(**r) for r in fields["reshards"]]
        if fields["time"] is not None:
            fields["time"] = StepTime(**fields["time"])
        return cls(**fields)

    def __str__(self) -> str:
        return table(self)
