"""Axis rules: from the logical axes that layers name to the axes of a mesh."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from tensorflow.experimental import dtensor

from gshard_tf.layouts.partition_spec import axes_of, join_axes
from gshard_tf.sharding.mesh_layout import MeshLayout

# A mesh axis; several, outermost first; or none.
Axes = str | Sequence[str] | None

LOGICAL_AXES = (
    "batch",
    "group",
    "expert",
    "expert_group",
    "expert_row",
    "length",
    "embed",
    "mlp",
    "heads",
    "kv",
    "vocab",
    "stage",
)


@keras.saving.register_keras_serializable(package="gshard_tf")
class AxisRules:
    """The mesh axis over which each logical axis is split.

    Layers say what a dimension *is* (`"expert"`, `"embed"`, ...); rules say where it
    goes, so that one model runs on any mesh. A logical axis without a rule is not
    split. Weights of layers that know nothing of this package are named by `paths`.

    Args:
        rules: Logical axis -> mesh axis, or None for "not split". Several mesh axes,
            `("data", "fsdp")`, split a dimension over the devices of all of them: into
            parts along the first, and these along the second, as jax's
            `PartitionSpec(("data", "fsdp"))` does. `"data+fsdp"` is the same, and is
            how reports name it. Names outside the usual ones (`batch group expert
            length embed mlp heads kv vocab stage`) are welcome: they are whatever
            layers pass to `annotate` and `name_axes`.
            `expert_group`, the groups of which an expert has the tokens, follows from
            others: it is split over the axes of `group` that experts and their widths
            leave, so that devices which share an expert share its tokens. So does
            `expert_row`, the tokens of the dropless dispatcher: over the axes of
            `group`, and of `expert`.
        paths: `(pattern, axes)` pairs for weights: a regular expression that must
            match the whole of the weight's Keras `path` (of a weight of Keras 2: its
            name, without `:0`), and one logical axis (or None) per dimension.
            Patterns win over the names that a layer gives. A weight that two patterns
            match is an error.
        fsdp: A mesh axis over which every large weight is stored split too, along its
            largest dimension that no other rule splits and that divides (ZeRO stage
            3, "fully sharded data parallel"). It is gathered where it is used, so
            that its use stays as the other rules say; gradients are summed into the
            parts. For models whose dense weights and slots do not fit: memory for
            communication. None: no.
        zero: The same for optimizer slots alone, whose weights stay as they are (ZeRO
            stage 1). Costs a gather of the new weights in each step.
        fsdp_min_bytes: Weights and slots of fewer bytes stay whole.
        batch_axes: The logical axes of the first dimensions of every input and output
            of a step. Defaults to the examples, `("batch",)`. `("batch", "length")`
            gives each device its part of `[B, L]` and `[B, L, M]`, for sequences (or,
            with other names, images) that are too long for one; an input without that
            dimension has only the first. A dimension that does not divide is whole.

    Example:

    ```python
    AxisRules(
        {"batch": "data", "group": "data", "expert": "data", "mlp": "model"},
        paths=[(r".*/dense/kernel", ("embed", "mlp"))],
    )
    ```
    """

    # Whether they are a `LayoutMap`: its patterns are for weights, not for slots, and
    # one of two or more dimensions that none mentions was forgotten, however small.
    is_layout_map = False

    def __init__(
        self,
        rules: Mapping[str, Axes],
        paths: Sequence[tuple[str, Sequence[str | None]]] = (),
        fsdp: Axes = None,
        zero: Axes = None,
        fsdp_min_bytes: int = 1 << 16,
        batch_axes: Sequence[str | None] = ("batch",),
    ):
        for logical, axis in rules.items():
            if not isinstance(logical, str) or not _is_axes(axis):
                raise ValueError(
                    "A rule must be a logical axis name and a mesh axis name (or "
                    "several, each once; or None), such as 'expert': 'data'. "
                    f"Received: {logical!r}: {axis!r}"
                )
        for name, axis in (("fsdp", fsdp), ("zero", zero)):
            if not _is_axes(axis):
                raise ValueError(
                    f"`{name}` must be the name of a mesh axis, or several, each once. "
                    f"Received: {name}={axis!r}"
                )
        if fsdp is not None and zero is not None:
            raise ValueError(
                "`fsdp` already shards optimizer slots; you must set `fsdp` or `zero`, "
                f"not both. Received: fsdp={fsdp!r}, zero={zero!r}"
            )
        self.rules = {logical: _joined(axis) for logical, axis in rules.items()}
        self.fsdp = _joined(fsdp)
        self.zero = _joined(zero)
        self.fsdp_min_bytes = fsdp_min_bytes
        if isinstance(batch_axes, str) or not all(
            isinstance(axis, str | None) for axis in batch_axes
        ):
            raise ValueError(
                "`batch_axes` must have a logical axis, or None, for each of the first "
                f"dimensions, such as ('batch', 'length'). Received: {batch_axes!r}"
            )
        self.batch_axes = tuple(batch_axes)
        self._is_default = False
        self._used: set[str] = set()
        self.paths = []
        for pattern, axes in paths:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    "A path pattern must be a regular expression. "
                    f"Received: {pattern!r} ({error})"
                ) from error
            self.paths.append((compiled, tuple(axes)))

    @classmethod
    def default(cls, mesh: dtensor.Mesh) -> "AxisRules":
        """The paper's layout for `mesh`.

        The first axis takes tokens (`batch`, `group`) and `expert`; a second one,
        if there is one, takes the widths (`mlp`, `heads`, `vocab`).
        """
        first, *others = mesh.dim_names
        rules: dict[str, str | None] = dict.fromkeys(
            ("batch", "group", "expert"), first
        )
        if others:
            rules |= dict.fromkeys(("mlp", "heads", "vocab"), others[0])
        default = cls(rules)
        default._is_default = True
        return default

    def check(self, mesh: dtensor.Mesh) -> None:
        """Raises `ValueError` for a rule whose mesh axis `mesh` does not have."""
        for name, axis in (("fsdp", self.fsdp), ("zero", self.zero)):
            if not set(axes_of(axis)) <= set(mesh.dim_names):
                raise ValueError(
                    f"`{name}` must be an axis of the mesh, which has "
                    f"{list(mesh.dim_names)}. Received: {name}={axis!r}"
                )
        for logical, axis in self.rules.items():
            if not set(axes_of(axis)) <= set(mesh.dim_names):
                raise ValueError(
                    f"The rule {logical!r}: {axis!r} must name an axis of the mesh, "
                    f"which has {list(mesh.dim_names)}. Received: rules={self.rules}"
                )

    def layout(
        self, axes: Sequence[str | None], mesh: dtensor.Mesh, what: str = "a tensor"
    ) -> MeshLayout:
        """The layout of something whose dimensions are named `axes`.

        Raises:
            ValueError: when two dimensions would be split over the same mesh axis.
        """
        spec = []
        taken: dict[str, str] = {}
        for logical in axes:
            axis = None if logical is None else self.mesh_axis(logical)
            for name in axes_of(axis):
                if name in taken:
                    raise ValueError(
                        f"The rules cannot split two dimensions of {what} over the "
                        f"mesh axis {name!r}: {taken[name]!r} and {logical!r}. Name "
                        "one of them None, or give it another mesh axis. Received: "
                        f"axes={tuple(axes)}, rules={self.rules}"
                    )
                taken[name] = str(logical)
            spec.append(axis)
        self._used.update(logical for logical in axes if logical is not None)
        return MeshLayout(tuple(spec), mesh)

    def mesh_axis(self, logical: str) -> str | None:
        """The mesh axis of a logical one, or several joined by "+"; None: not split."""
        if logical in self.rules or logical not in ("expert_group", "expert_row"):
            return self.rules.get(logical)
        names = ("group", "expert", "embed", "mlp")
        group, expert, embed, mlp = (axes_of(self.rules.get(name)) for name in names)
        if logical == "expert_row":
            return join_axes(dict.fromkeys(group + expert))
        taken = expert + embed + mlp
        return join_axes(name for name in group if name not in taken)

    def path_axes(
        self, path: str, rank: int | None = None
    ) -> tuple[str, tuple[str | None, ...]] | None:
        """The pattern that matches a weight's path, and its axes, or None.

        Args:
            path: The path.
            rank: The number of dimensions of the weight, for rules whose patterns may
                name fewer. Those here may not.
        """
        del rank
        matches = [(p.pattern, axes) for p, axes in self.paths if p.fullmatch(path)]
        if len(matches) > 1:
            raise ValueError(
                "Path patterns must exclude each other. Received: two that match the "
                f"weight {path!r}, {matches[0][0]!r} and {matches[1][0]!r}"
            )
        return matches[0] if matches else None

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, as a Keras layer that keeps rules would save them."""
        return {
            "rules": dict(self.rules),
            "paths": [[pattern.pattern, list(axes)] for pattern, axes in self.paths],
            "fsdp": self.fsdp,
            "zero": self.zero,
            "fsdp_min_bytes": self.fsdp_min_bytes,
            "batch_axes": list(self.batch_axes),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AxisRules":
        """Makes rules of what `get_config` returned."""
        return cls(**config)

    def unused(self) -> list[tuple[str, str]]:
        """The rules of the user that nothing has used yet."""
        if self._is_default:
            return []
        return [
            (logical, axis)
            for logical, axis in self.rules.items()
            if axis is not None and logical not in self._used
        ]

    def __repr__(self) -> str:
        paths = [(pattern.pattern, axes) for pattern, axes in self.paths]
        given = {"fsdp": self.fsdp, "zero": self.zero, "batch_axes": self.batch_axes}
        more = "".join(
            f", {name}={axis!r}"
            for name, axis in given.items()
            if axis not in (None, ("batch",))
        )
        return f"AxisRules({self.rules}, paths={paths}{more})"


def _is_axes(axis: Any) -> bool:
    """Returns whether it is a mesh axis, several without a repetition, or None."""
    if axis is None:
        return True
    names = axis
    if isinstance(axis, str):
        names = axes_of(axis)
    elif not isinstance(axis, tuple | list):
        return False
    is_named = all(isinstance(name, str) and name for name in names)
    return bool(names) and is_named and len(set(names)) == len(names)


def _joined(axes: Axes) -> str | None:
    return axes if axes is None or isinstance(axes, str) else join_axes(axes)
