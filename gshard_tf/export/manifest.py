"""Manifest of a saved program: its tensors, layouts and meshes by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gshard_tf.layouts.partition_spec import PartitionSpec, parts_over

FORMAT = 1
#: Platforms that a program can be exported for, as jax names them.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Description of an argument, a result, or an entry of the state.

    Attributes:
        name: `x`, `loss`, or for state `model/dense/kernel`: the same in every process.
        shape: The global shape.
        dtype: The name that numpy (and ml_dtypes) uses.
        layout: For each dimension, the mesh axis that it is split over (several are
            joined by "+"), or None.
        role: "weight", "optimizer", "metric", "other" (statistics, seeds) or "constant"
            for state; else "input" or "output".
        path: The Keras path of a variable where it was saved, for information.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: PartitionSpec
    role: str
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The program for one mesh.

    Attributes:
        mesh: Axis -> size.
        start: Its offset in the joined bytes of all programs of the file.
        size: Its number of bytes.
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
    """Description of a saved program.

    Attributes:
        model: The name of the Keras model.
        mode: "train", "evaluate" or "predict".
        inputs: The tensors of a batch, in the order of the program's arguments.
        outputs: The outputs of a step, in the order of its results.
        state: The state of a step, in the order of the arguments after the inputs. The
            memory of updated entries is reused.
        updates: Indices into `state` of the new values that follow the outputs.
        variants: The meshes that the file has programs for, the model's own first.
        platforms: The platforms that it can be loaded on, of `PLATFORMS`.
        versions: The versions of the packages that made the file.
        initial_state: The name of a state file in the same folder to start from, or
            None.
        format: The format of this manifest.
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
            ValueError: when it is of another format.
        """
        fields = json.loads(text)
        if fields.get("format") != FORMAT:
            raise ValueError(
                f"The program must be of format {FORMAT}, the one that this version of "
                f"gshard_tf reads. Received: format={fields.get('format')}"
            )
        for key in ("inputs", "outputs", "state"):
            fields[key] = [_tensor(tensor) for tensor in fields[key]]
        fields["variants"] = [Variant(**variant) for variant in fields["variants"]]
        return cls(**fields)


def _tensor(fields: Mapping[str, Any]) -> Tensor:
    lists = {key: tuple(fields[key]) for key in ("shape", "layout")}
    return Tensor(**{**fields, **lists})


def fit_layout(tensor: Tensor, mesh: Mapping[str, int]) -> PartitionSpec:
    """Returns a tensor's layout on a mesh, whole where the axis does not divide."""
    return tuple(
        None if size % parts_over(axis, mesh) else axis
        for axis, size in zip(tensor.layout, tensor.shape, strict=True)
    )
