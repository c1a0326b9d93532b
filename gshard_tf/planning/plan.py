"""The report of a plan: plain data, as a table and as JSON."""

import dataclasses
import json
from typing import Any

from gshard_tf.planning.records import (
    Buffer,
    Communication,
    Memory,
    OutOfMemory,
    Reshard,
    StepTime,
    Weight,
)
from gshard_tf.planning.text import table

#: Raised when the fields change or are counted otherwise, so that an old file is
#: refused and not misread.
FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a model needs and does on a mesh that need not exist.

    Attributes:
        model: Its name.
        mode: "train", "evaluate" or "predict".
        topology: Such as "v3:8x8".
        chip: What a chip has: the fields of `Chip`; None on a CPU.
        slice_shape: Chips along each dimension.
        mesh: Axes and their sizes.
        rules: Logical axis -> mesh axis.
        inputs: dtype and shape of each tensor of the batch.
        weights: All variables.
        memory: Per core; None if it does not fit.
        out_of_memory: Why it does not fit; None if it does.
        flops: Of the compiled products, per core.
        flops_as_written: Of the step's products before partitioning, over the cores.
        flops_by_layer: Of the compiled products, per core.
        bytes_accessed: Per core, as the compiler counts them.
        communication: By kind, layer and axis.
        reshards: Those that nobody asked for.
        time: The estimate; None on a CPU or if it does not fit.
        complaints: Loops that cannot be counted, rules that match nothing, large
            weights that no rule mentions.
        advice: What to try.
        trace_seconds: To trace and lower the step.
        compile_seconds: To partition and compile it.
        host_bytes: Largest resident size of this process so far.
        versions: Of the packages that took part.
        key: What identifies the plan's content.
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

    @property
    def num_devices(self) -> int:
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of a core."""
        return self.out_of_memory is None

    @property
    def bytes_needed(self) -> float:
        """Bytes per core that the program needs, whether it fits or not."""
        if self.out_of_memory is not None:
            return self.out_of_memory.needed
        return self.memory.total if self.memory else 0

    @property
    def bytes_available(self) -> float | None:
        """Bytes that a core has for it; None where they are the host's."""
        if self.out_of_memory is not None:
            return self.out_of_memory.capacity
        return self.memory.capacity if self.memory else None

    @property
    def parameters(self) -> int:
        """How many numbers the model's weights have."""
        found = 0
        for weight in self.weights:
            if weight.role in ("weight", "frozen"):
                count = 1
                for size in weight.shape:
                    count *= size
                found += count
        return found

    @property
    def flops_ratio(self) -> float | None:
        """Compiled over written FLOPs: 1.05 means that 5 percent are wasted."""
        if self.flops is None or not self.flops_as_written:
            return None
        return self.flops / self.flops_as_written

    def state_bytes(self, *roles: str, per_core: bool = False) -> int:
        """Bytes of the variables of these roles; of all without any."""
        return sum(
            w.bytes_per_core if per_core else w.bytes
            for w in self.weights
            if not roles or w.role in roles
        )

    def count(self, kind: str, layer: str = "") -> int:
        """How many collectives of a kind run in a step, in a layer or what is in it."""
        return sum(
            c.count
            for c in self.communication
            if c.kind == kind and f"{c.layer}/".startswith(f"{layer}/" if layer else "")
        )

    def to_json(self) -> str:
        """The whole report as one JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What `to_json` wrote.

        Raises:
            ValueError: when the text is no plan, or one of another version.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is no plan: {error}") from error
        found = fields.pop("format", None) if isinstance(fields, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"This is no plan of this version (format {FORMAT}); make it anew. "
                f"Received: format={found!r}"
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
        fields["reshards"] = [Reshard(**r) for r in fields["reshards"]]
        if fields["time"] is not None:
            fields["time"] = StepTime(**fields["time"])
        return cls(**fields)

    def __str__(self) -> str:
        return table(self)
