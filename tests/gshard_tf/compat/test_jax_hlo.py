"""HLO modules in jax."""

import jax
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat.jax_hlo import call_hlo, compiled_as_text, hlo_as_text
from gshard_tf.spmd import lowering


def module():
    spec = tf.TensorSpec([3])
    return lowering.lower(*lowering.trace(lambda x: (x + 1.0, 2.0 * x), [spec])).hlo


def test_a_module_is_called_in_a_traced_function():
    hlo, types = module(), [jax.ShapeDtypeStruct((3,), np.float32)] * 2
    x = np.arange(3, dtype=np.float32)
    more, double = jax.jit(lambda x: call_hlo(hlo, [x], types, {}))(x)
    np.testing.assert_array_equal(more, x + 1)
    np.testing.assert_array_equal(double, 2 * x)


def test_the_text_names_the_operations():
    text = hlo_as_text(module())
    assert text.startswith("HloModule") and "op_name=" in text


class FromANewerCompiler:
    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: an async-update\nof 3 operands")


def test_a_program_that_cannot_be_printed_says_what_to_do():
    with pytest.raises(RuntimeError, match="newer jax and jaxlib.*an async-update$"):
        compiled_as_text(FromANewerCompiler())
