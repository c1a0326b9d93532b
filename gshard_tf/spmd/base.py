"""Strategies on a mesh: the public mixin, and the extended half that two of them share.

`SpmdStrategy` and `AbstractStrategy` extend `MeshExtended`. `tpu_strategy` extends
TensorFlow's own half, and shares the mixin.
"""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.compat.tf_distribute import AroundScope, OneDeviceExtended
from gshard_tf.sharding.layout_map import as_rules
from gshard_tf.sharding.layout_report import LayoutReport, describe
from gshard_tf.sharding.mesh import use_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts


class MeshStrategy:
    """Mixin with `mesh`, `rules`, `layout()` and `describe()` for a strategy on a mesh.

    Its `extended` has `mesh`, `layouts`, and `owns(value)`, which says whether a
    variable is one of its own.
    """

    extended: Any
    # Appended to the error for a variable that the strategy does not own.
    unowned_hint = ""

    @property
    def mesh(self) -> dtensor.Mesh:
        """The devices of one replica."""
        return self.extended.mesh

    @property
    def rules(self) -> AxisRules:
        """The rules that turn logical axes into axes of the mesh."""
        return self.extended.layouts.rules

    def layout(self, variable: tf.Variable | keras.Variable) -> dtensor.Layout:
        """The layout in which a variable of this strategy is stored.

        Raises:
            ValueError: when a dimension of it is split over several mesh axes, which
                DTensor has no layout for. `describe` shows those too.
        """
        decision = self.extended.layouts.layout_for(owned(variable, self))
        return decision.storage.to_dtensor()

    def describe(self, model: keras.Model) -> LayoutReport:
        """Returns the layout of each weight and slot of a built model, with its reason.

        Returns:
            A `LayoutReport`; `print` it for a table.
        """
        return describe(
            model, self.extended.layouts, lambda variable: owned(variable, self)
        )


def owned(variable: tf.Variable | keras.Variable, strategy: MeshStrategy) -> Any:
    """Returns the strategy's own variable behind a Keras one.

    Raises:
        ValueError: for a variable that the strategy did not create.
    """
    value = backend_variable(variable)
    if not strategy.extended.owns(value):
        name = getattr(variable, "path", getattr(variable, "name", variable))
        raise ValueError(
            "A variable must be made inside the strategy's scope to be on its mesh. "
            "Make the model, and call its `compile`, `quantize` and `enable_lora`, "
            "inside `with strategy.scope():`."
            f"{strategy.unowned_hint} Received: the variable {name!r}, which was not "
            f"made inside this {type(strategy).__name__}'s scope"
        )
    return value


class ExplainedScope(AroundScope):
    """A strategy's scope that says where an optimizer from outside should be made.

    Keras asks the strategy that was in scope when the optimizer was made for the slots.
    TensorFlow's error for that names two objects, and not what to do.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        handled = self._scope.__exit__(kind, error, trace)
        if (
            not handled
            and isinstance(error, RuntimeError)
            and "Mixing different tf.distribute.Strategy" in str(error)
        ):
            raise ValueError(
                "The optimizer must be made, and `compile` called, inside `with "
                "strategy.scope():`, as the model was. Received: an optimizer of "
                f"another scope, or of none. (TensorFlow says: {error})"
            ) from error
        return handled


class MeshExtended(OneDeviceExtended):
    """`StrategyExtended` of a strategy on a mesh.

    It creates variables, assigns their layouts, and enables annotations while a step
    is traced.

    Args:
        container: The strategy.
        mesh: The mesh.
        rules: Its rules, or a map of Keras; None: the paper's layout,
            `AxisRules.default(mesh)`.

    Raises:
        ValueError: when a rule does not fit the mesh.
    """

    def __init__(
        self,
        container: tf.distribute.Strategy,
        mesh: dtensor.Mesh,
        rules: AxisRules | keras.distribution.LayoutMap | None,
    ):
        rules = as_rules(rules, mesh)
        super().__init__(container, "/cpu:0")
        self.mesh = mesh
        self.layouts = VariableLayouts(mesh, rules)
        self._tracing = _Tracing()

    @property
    def strategy(self) -> Any:
        """The strategy."""
        return self._container_strategy()

    def create_variable(self, **kwargs: Any) -> MeshVariableBase:
        """A variable of the strategy's own kind, by the arguments of `tf.Variable`."""
        raise NotImplementedError

    def owns(self, value: Any) -> bool:
        """Returns whether `create_variable` made a variable."""
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
        if kwargs.get("initial_value") is None and kwargs.get("shape") is not None:
            # A variable of a SavedModel, whose value is restored later.
            shape, dtype = kwargs["shape"], kwargs["dtype"]
            kwargs["initial_value"] = lambda: tf.zeros(shape, dtype)
        with tf.device(self._device):
            variable = self.create_variable(**kwargs)
        self.layouts.register(variable, reference)
        return variable

    def _validate_colocate_with_variable(self, colocate_with_variable: Any) -> None:
        owned(colocate_with_variable, self.strategy)

    @property
    def is_tracing(self) -> bool:
        """True while this thread is tracing a step."""
        return self._tracing.depth > 0

    def run_step(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls `fn` as the step of the only replica, with annotations switched on."""
        self._tracing.depth += 1
        try:
            with use_mesh(self.mesh, self.layouts.rules):
                return super()._call_for_each_replica(fn, args, kwargs)
        finally:
            self._tracing.depth -= 1


class _Tracing(threading.local):
    """The number of steps that this thread is tracing, one inside the other."""

    depth = 0
