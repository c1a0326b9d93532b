"""Checks that a checkpoint holds all variables that a training step changes."""

from collections.abc import Mapping

import keras

from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.compat.keras_variables import backend_variable


def check_state_is_complete(model: keras.Model, state: Mapping[str, Variable]) -> None:
    """Raises `ValueError` when a training step changes a variable not in `state`."""
    known = {id(backend_variable(variable)) for variable in state.values()}
    iterations = backend_variable(model.optimizer.iterations)
    for program in getattr(model.distribute_strategy, "programs", []):
        changed = [program.step.captures[i] for i in program.step.updates]
        # Other models of the strategy have steps too, and evaluation.
        if any(variable is iterations for variable in changed):
            # The manifest has the state of Keras's global seed generator.
            known.add(id(global_seed_state()))
            missing = [
                v.path
                for v in changed
                if id(v) not in known and id(getattr(v, "variable", v)) not in known
            ]
            if missing:
                raise ValueError(
                    "`extra_state` must hold the variables that the training step "
                    "changes and the model does not know of, or a checkpoint would "
                    "lack them: CheckpointCallback(extra_state={name: variable or "
                    f"optimizer}}). Received: no {missing}"
                )
