"""Keras's export to a SavedModel."""

import inspect

# Imported for its name: without the package this module fails to load, in place of an
# export that silently reads variables the wrong way.
from keras.src import export

_PACKAGE = export.__name__


def is_exporting() -> bool:
    """Returns whether Keras is tracing a function for a SavedModel.

    The trace is an ordinary one, and saving begins after it, so the stack is searched.

    Relies on: `keras.src.export`, from within which Keras traces what it exports. On an
    upgrade, watch: the package's name, and that `Model.export` still traces there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            return True
        frame = frame.f_back
    return False
