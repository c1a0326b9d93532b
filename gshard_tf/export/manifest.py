"""What a saved program says of itself: tensors, layouts and meshes, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1
#: Platforms that a program can be exported for, as jax names them.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
Layout = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An argument, a result, or a part of the state.

    Attributes:
        name: `x`, `loss`, or for state `model/dense/kernel`: the same in every process.
        shape: The whole shape, whatever number of devices holds it.
        dtype: As numpy (and ml_dtypes) call it.
        layout: For each dimension, the mesh axis that it is split over, or None.
        role: Of state: "weight", "optimizer", "metric", "other" (statistics, seeds) or
            "constant"; else "input" or "output".
        path: Keras's path of a variable where it was saved, for people to read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    role: str
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The program for one mesh.

    Attributes:
        mesh: Axis -> size.
        start: Where it begins among the bytes of all programs of the file.
        size: How many bytes it has.
    """

    mesh: dict[str, int]
    start: int
    size: int

    @property
    def devices(self) -> int:
        count = 1
        for size in self.mesh.values():
            count *= size
        return count


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a saved program but the program.

    Attributes:
        model: The name of the Keras model.
        mode: "train", "evaluate" or "predict".
        inputs: The tensors of a batch, in the order of the program's arguments.
        outputs: What a step says, in the order of its results.
        state: What it reads, in the order of the arguments after the inputs. A
            part that it changes is changed in place of the old one.
        updates: Indices into `state` of the new values that follow the outputs.
        variants: The meshes that the file has programs for, the model's own first.
        platforms: Which jax calls "cpu", "cuda", "rocm" and "tpu".
        versions: Of what made the file.
        initial_state: The state to start from: a file beside the program's, or None.
        format: Of this file.
    """

    model: str
    mode: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    state: list[Tensor]
    updates: list[int]
    variants: list[Variant]
    platforms: list[str]
    versions: dict[str, str]
    initial_state: str | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: when it is of a later format.
        """
        fields = json.loads(text)
        if fields.get("format") != FORMAT:
            raise ValueError(
                f"This program is of format {fields.get('format')}, and this version "
                f"of gshard_tf reads format {FORMAT}."
            )
        for key in ("inputs", "outputs", "state"):
            fields[key] = [_tensor(tensor) for tensor in fields[key]]
        fields["variants"] = [Variant(**variant) for variant in fields["variants"]]
        return cls(**fields)

    def choose(
        self, devices: int, mesh: int | Mapping[str, int] | None = None
    ) -> Variant:
        """The variant to load on a machine.

        Args:
            devices: How many it has.
            mesh: How many to use, or the axes and their sizes. None: as many as can
                be.

        Raises:
            ValueError: when the file has no such program, or there are too few
                devices.
        """
        known = ", ".join(str(v.mesh) for v in self.variants)
        fitting = [v for v in self.variants if v.devices <= devices]
        if isinstance(mesh, Mapping):
            found = [v for v in self.variants if v.mesh == dict(mesh)]
        elif mesh is not None:
            found = [v for v in self.variants if v.devices == mesh]
        else:
            found = sorted(fitting, key=lambda v: -v.devices)
        if not found:
            raise ValueError(
                f"The file has programs for the meshes {known}. Save it again with "
                f"meshes=[...]. Received: mesh={mesh}, {devices} device(s)"
            )
        if found[0] not in fitting:
            raise ValueError(
                f"The mesh {found[0].mesh} needs {found[0].devices} devices. Smaller "
                f"ones in this file: {[v.mesh for v in fitting]}. "
                f"Received: {devices} device(s)"
            )
        return found[0]


def _tensor(fields: Mapping[str, Any]) -> Tensor:
    lists = {key: tuple(fields[key]) for key in ("shape", "layout")}
    return Tensor(**{**fields, **lists})


def fit_layout(tensor: Tensor, mesh: Mapping[str, int]) -> Layout:
    """The layout of a tensor on a mesh: whole along what does not divide."""
    return tuple(
        axis if axis is not None and size % mesh[axis] == 0 else None
        for axis, size in zip(tensor.layout, tensor.shape, strict=True)
    )
