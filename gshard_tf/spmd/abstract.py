"""Variables without memory, so that a model of any size can be built and traced.

Inside `AbstractStrategy.scope()` Keras builds layers, optimizers and metrics as
always, but a variable is only a shape, a dtype and a name. While a step is being
traced it stands for a tensor: its old value at first, then whatever was assigned.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.keras_models import in_symbolic_scope
from gshard_tf.compat.keras_variables import current_variable, known_shape
from gshard_tf.compat.tf_gradients import with_dense_gradient
from gshard_tf.compat.tf_variables import ResourceVariableLike, notify_tapes
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.spmd import lowering
from gshard_tf.spmd.base import MeshExtended, MeshStrategy


class AbstractVariable(ResourceVariableLike, MeshVariableBase, tf.Variable):
    """A `tf.Variable` that holds no value.

    Args:
        shape: Its static shape.
        dtype: Its dtype.
        name: Its TensorFlow name.
        trainable: As in `tf.Variable`.
    """

    def __init__(
        self, shape: tf.TensorShape, dtype: tf.DType, name: str, trainable: bool
    ):
        self._shape = shape
        self._dtype = dtype
        self._name = name
        self._trainable = trainable
        self._tensor: tf.Tensor | None = None
        self._graph: Any = None
        self._was_assigned = False

    # -- while a step is traced --------------------------------------------------

    def enter(self, tensor: tf.Tensor, graph: Any) -> None:
        """From now on it stands for `tensor`, and may be assigned in `graph`."""
        self._tensor, self._graph, self._was_assigned = tensor, graph, False

    def leave(self) -> tf.Tensor | None:
        """Stands for nothing again; returns the new value if it was assigned."""
        tensor, assigned = self._tensor, self._was_assigned
        self._tensor = self._graph = None
        return tensor if assigned else None

    @property
    def handle(self) -> tf.Tensor:
        # What tapes watch and differentiate by.
        if self._tensor is not None and not in_symbolic_scope():
            return self._tensor
        if tf.executing_eagerly():
            raise ValueError(
                "A model that was built for a plan cannot compute: it allocates "
                "nothing, and only its train_step, test_step or predict_step can be "
                f"traced. Received: a read of the variable {self.path!r}"
            )
        # Keras infers shapes in a graph that never runs.
        return tf.compat.v1.placeholder(self._dtype, self._shape)

    def value(self) -> tf.Tensor:
        if self._tensor is not None and not in_symbolic_scope():
            # Tapes watch the handle, from which what follows is made.
            notify_tapes(self)
            tensor = self._tensor
            return with_dense_gradient(lambda: tf.identity(tensor), "Identity", tensor)
        return tf.identity(self.handle)

    read_value = value

    def assign(
        self,
        value: Any,
        use_locking: bool = False,
        name: str | None = None,
        read_value: bool = True,
    ) -> "AbstractVariable":
        del use_locking, name, read_value
        if self._tensor is None or in_symbolic_scope():
            return self  # a first value, say, which a plan does not need
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise ValueError(
                "A plan cannot follow an assignment inside tf.cond or tf.while_loop: "
                "without memory, a variable's new value must be known where the step "
                "ends. Gradient accumulation, loss scaling and moving averages of "
                "weights do this; plan without them (they add the bytes of their "
                f"variables). Received: an assignment of {self.path!r}"
            )
        value = tf.cast(tf.convert_to_tensor(value), self._dtype)
        if not self._shape.is_compatible_with(value.shape):
            raise ValueError(
                f"A value of {self.path!r} must have the shape {self._shape}. "
                f"Received: a value of shape {value.shape}"
            )
        self._tensor = tf.ensure_shape(value, self._shape)
        self._was_assigned = True
        return self

    def assign_add(self, delta: Any, *args: Any, **kwargs: Any) -> "AbstractVariable":
        return self.assign(self.value() + tf.cast(delta, self._dtype))

    def assign_sub(self, delta: Any, *args: Any, **kwargs: Any) -> "AbstractVariable":
        return self.assign(self.value() - tf.cast(delta, self._dtype))

    def scatter_add(self, sparse_delta: tf.IndexedSlices, **kwargs: Any) -> Any:
        return self._scatter(tf.tensor_scatter_nd_add, sparse_delta)

    def scatter_sub(self, sparse_delta: tf.IndexedSlices, **kwargs: Any) -> Any:
        return self._scatter(tf.tensor_scatter_nd_sub, sparse_delta)

    def scatter_update(self, sparse_delta: tf.IndexedSlices, **kwargs: Any) -> Any:
        return self._scatter(tf.tensor_scatter_nd_update, sparse_delta)

    def _scatter(self, scatter: Callable, slices: tf.IndexedSlices) -> Any:
        index = tf.cast(slices.indices, tf.int32)[:, None]
        return self.assign(scatter(self.value(), index, slices.values))

    # -- what it is ----------------------------------------------------------------

    def __tf_tensor__(
        self, dtype: tf.DType | None = None, name: str | None = None
    ) -> tf.Tensor:
        value = self.value()
        return value if dtype is None else tf.cast(value, dtype)

    @property
    def shape(self) -> tf.TensorShape:
        return self._shape

    @property
    def dtype(self) -> tf.DType:
        return self._dtype

    @property
    def name(self) -> str:
        return self._name

    @property
    def trainable(self) -> bool:
        return self._trainable

    @property
    def device(self) -> str:
        return ""

    @property
    def synchronization(self) -> tf.VariableSynchronization:
        return tf.VariableSynchronization.AUTO

    @property
    def aggregation(self) -> tf.VariableAggregation:
        return tf.VariableAggregation.NONE

    def __repr__(self) -> str:
        return f"<AbstractVariable {self.path!r} {self._shape} {self._dtype.name}>"


class AbstractStrategy(MeshStrategy, tf.distribute.Strategy):
    """Builds models without memory, for a mesh that need not exist.

    Args:
        mesh: The mesh, over devices of any type.
        rules: An `AxisRules`; defaults to `AxisRules.default(mesh)`.
    """

    def __init__(self, mesh: dtensor.Mesh, rules: AxisRules | None = None):
        super().__init__(AbstractExtended(self, mesh, rules))


class AbstractExtended(MeshExtended):
    """`StrategyExtended` of `AbstractStrategy`; it has a list of all its variables."""

    def __init__(
        self,
        container: AbstractStrategy,
        mesh: dtensor.Mesh,
        rules: AxisRules | None,
    ):
        super().__init__(container, mesh, rules)
        self.variables: list[AbstractVariable] = []

    def create_variable(
        self,
        initial_value: Any = None,
        dtype: Any = None,
        name: str | None = None,
        trainable: bool | None = None,
        shape: Any = None,
        **unused: Any,
    ) -> AbstractVariable:
        del unused  # what concerns values and replicas
        keras_variable = current_variable()
        if shape is not None:
            shape = tf.TensorShape(shape)
        elif callable(initial_value) and keras_variable is not None:
            shape = known_shape(keras_variable)
        else:
            # A graph that never runs: nothing is computed.
            with tf.__internal__.FuncGraph("initial_value").as_default():
                value = initial_value() if callable(initial_value) else initial_value
                value = tf.convert_to_tensor(value, dtype)
            shape, dtype = value.shape, value.dtype
        if dtype is None and keras_variable is not None:
            dtype = keras_variable.dtype
        variable = AbstractVariable(
            shape, tf.as_dtype(dtype), name or "Variable", trainable is not False
        )
        self.variables.append(variable)
        return variable

    def owns(self, value: Any) -> bool:
        return isinstance(value, AbstractVariable)


@dataclasses.dataclass
class TracedState:
    """Filled by `standing_for`: the new value of each variable that was assigned."""

    assigned: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def standing_for(
    variables: list[AbstractVariable], tensors: list[tf.Tensor]
) -> Iterator[TracedState]:
    """Lets variables stand for tensors of the graph that is being traced."""
    state = TracedState()
    graph = tf.compat.v1.get_default_graph()
    for variable, tensor in zip(variables, tensors, strict=True):
        variable.enter(tensor, graph)
    try:
        yield state
    finally:
        for i, variable in enumerate(variables):
            new = variable.leave()
            if new is not None:
                state.assigned[i] = new


def is_abstract(model: keras.Model) -> bool:
    """Returns whether a model was built in the scope of an `AbstractStrategy`."""
    return any(isinstance(v.value, AbstractVariable) for v in model.variables)


def lower_abstract(
    extended: AbstractExtended, fn: Callable[..., Any], arguments: Any
) -> lowering.LoweredStep:
    """Traces `fn(*arguments)` and lowers it.

    Args:
        extended: Of the strategy in whose scope the variables were made.
        fn: The step, `model.train_step` say.
        arguments: A nest of `tf.TensorSpec` of static shapes.

    Returns:
        The step, whose captures are all the variables of the strategy, then constants.
    """
    specs = tf.nest.flatten(arguments)
    variables = list(extended.variables)
    state = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
    updates: list[int] = []

    def step(*tensors):
        inputs, values = tensors[: len(specs)], tensors[len(specs) :]
        with standing_for(variables, list(values)) as traced:
            outputs = extended.run_step(
                fn, tf.nest.pack_sequence_as(arguments, list(inputs)), {}
            )
            # While they still stand for tensors: outputs may hold variables.
            outputs = lowering.as_results(outputs)
        updates[:] = sorted(traced.assigned)
        return outputs, [traced.assigned[i] for i in updates]

    function, structure = lowering.trace(step, [*specs, *state])
    created = len(extended.variables) - len(variables)
    if created:
        raise ValueError(
            "All variables must exist before the step is traced. Build the model, its "
            "optimizer and its metrics completely in the function that makes it. "
            f"Received: a step that creates {created} variables, such as "
            f"{extended.variables[-1].path!r}"
        )
    lowered = lowering.lower(function, structure)
    return dataclasses.replace(
        lowered,
        inputs=lowered.inputs[: len(specs)],
        captures=[*variables, *lowered.captures],
        num_outputs=lowered.num_outputs - len(updates),
        updates=updates,
        structure=structure[0],
    )
