"""What the strategies of a mesh have in common: layouts, and steps with annotations."""

import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

# Private API: the extended half of OneDeviceStrategy, which feeds one global batch to
# one replica, as we do. On an upgrade, check `_create_variable` and
# `_call_for_each_replica`.
from tensorflow.python.distribute import one_device_strategy

from gshard_tf.sharding.mesh import use_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import PlacedVariable
from gshard_tf.sharding.variable_layouts import Layouts


class MeshExtended(one_device_strategy.OneDeviceExtended):
    """What `tf.distribute` asks of a strategy of a mesh behind its public face.

    Args:
        container: The strategy.
        mesh: The mesh.
        rules: Its rules; None: the paper's layout, `AxisRules.default(mesh)`.

    Raises:
        ValueError: when a rule does not fit the mesh.
    """

    def __init__(
        self,
        container: tf.distribute.Strategy,
        mesh: dtensor.Mesh,
        rules: AxisRules | None,
    ):
        rules = AxisRules.default(mesh) if rules is None else rules
        if not isinstance(rules, AxisRules):
            raise ValueError(f"rules is an AxisRules. Received: {rules!r}")
        rules.check(mesh)
        super().__init__(container, "/cpu:0")
        self.mesh = mesh
        self.layouts = Layouts(mesh, rules)
        self._tracing = _Tracing()

    def make_variable(self, **kwargs: Any) -> PlacedVariable:
        """A variable of the strategy's own kind, by the arguments of `tf.Variable`."""
        raise NotImplementedError

    def is_ours(self, value: Any) -> bool:
        """Whether `make_variable` made it."""
        raise NotImplementedError

    def _create_variable(self, next_creator: Callable, **kwargs: Any) -> Any:
        del next_creator  # it would make a plain variable
        reference = kwargs.pop("colocate_with", None)
        # The second is of version 1's variables, with which Checkpoint counts saves.
        for unused in (
            "use_resource",
            "expected_shape",
            "experimental_batch_initialization",
        ):
            kwargs.pop(unused, None)
        with tf.device(self._device):
            variable = self.make_variable(**kwargs)
        self.layouts.note_created(variable, reference)
        return variable

    def ours(self, variable: tf.Variable | keras.Variable) -> Any:
        """The variable itself; raises `ValueError` for one that is not ours."""
        value = variable.value if isinstance(variable, keras.Variable) else variable
        if not self.is_ours(value):
            name = getattr(variable, "path", getattr(variable, "name", variable))
            raise ValueError(
                f"The variable {name!r} was not made inside this "
                f"{type(self._container_strategy()).__name__}'s scope, so it does not "
                "live on its mesh. Make the model, and compile it, inside "
                "`with strategy.scope():`."
            )
        return value

    def _validate_colocate_with_variable(self, colocate_with_variable: Any) -> None:
        self.ours(colocate_with_variable)

    @property
    def is_tracing(self) -> bool:
        """Whether this thread is tracing a step."""
        return self._tracing.depth > 0

    def call_fn(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls `fn` as the step of the only replica, with annotations switched on."""
        self._tracing.depth += 1
        try:
            with use_mesh(self.mesh, self.layouts.rules):
                return super()._call_for_each_replica(fn, args, kwargs)
        finally:
            self._tracing.depth -= 1


class _Tracing(threading.local):
    """How many steps this thread is tracing, one inside the other."""

    depth = 0
