"""Lowering of a traced TensorFlow function to HLO."""

from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function import compiler_ir


def lower_to_hlo(function: Any) -> bytes:
    """Returns a concrete function of static shapes as a serialized `HloModuleProto`.

    Its parameters are the arguments, then the captures; its results are the outputs,
    then the new values of variables.

    Relies on: `compiler_ir.from_concrete_function`; the public
    `experimental_get_compiler_ir` traces again, and in another context. On an upgrade,
    watch: that order of parameters and results.

    Raises:
        ValueError: for an operation that XLA cannot compile.
    """
    with tf.init_scope():
        generate = compiler_ir.from_concrete_function(function)
        # HLO is lowered for the CPU whatever it is compiled for: a TensorFlow without
        # that platform could not lower it otherwise, and the module is the same.
        return generate(stage="hlo_serialized", platform_name="CPU")
