"""The state of a Keras model as a file that jax alone reads, and back."""

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.matching import match
from gshard_tf.checkpoints.training_state import training_state
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.export.state_file import read_state, write_state
from gshard_tf.io.paths import local_path


def save_state(model: keras.Model, path: str | os.PathLike, step: int = 0) -> None:
    """Writes the variables of a model, its metrics and its optimizer to a file.

    Args:
        model: A model that is built and compiled, as the first step leaves it.
        path: An `.npz` file on a local or mounted disk. An existing one is replaced.
        step: How many steps the model has been trained. The runner resumes there.

    Raises:
        ValueError: when `path` is remote, `gs://` say.
    """
    path = local_path(path)  # before everything is copied
    arrays = {
        name: backend_variable(variable).numpy()
        for name, variable in training_state(model).items()
    }
    write_state(path, arrays, step=step)


def load_state(model: keras.Model, path: str | os.PathLike) -> dict[str, Any]:
    """Assigns the state of a file that `save_state` or the runner wrote to a model.

    Args:
        model: The model whose state it is, or one made by the same code.
        path: The file.

    Returns:
        The other entries of the file: `step`, the number of steps done.

    Raises:
        ValueError: when the file does not fit the model; nothing is changed then.
    """
    arrays, meta = read_state(path)
    variables: Mapping[str, Any] = training_state(model)
    matches = match(
        {name: (tuple(v.shape), _dtype(v)) for name, v in variables.items()},
        {name: Array(a.shape, a.dtype.name, "", ()) for name, a in arrays.items()},
    )
    for name, source in matches.sources.items():
        variables[name].assign(arrays[source])
    return meta


def _dtype(variable: Any) -> str:
    return np.dtype(backend_variable(variable).dtype.as_numpy_dtype).name
