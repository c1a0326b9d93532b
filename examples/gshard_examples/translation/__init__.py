"""Translating a hundred languages into English, the GShard paper's own task.

`load` gives a trained translator to call. This package's modules import TensorFlow
only where they need it, so that preparing a corpus or scoring a file costs no
TensorFlow start-up.
"""

from gshard_examples.translation.loading import LoadedTranslator, load

__all__ = ["LoadedTranslator", "load"]
