"""A step lowered for the CPU takes no function of the CPU to another platform."""

import pytest
import tensorflow as tf

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.custom_calls import check_portable
from gshard_tf.spmd import lowering


def lowered(fn):
    return lowering.lower(*lowering.trace(fn, [tf.TensorSpec([4, 4])])).hlo


def test_decompositions_that_xla_expands_pass():
    hlo = lowered(lambda x: (tf.linalg.qr(x), tf.linalg.eigh(x)))
    assert b"Qr" in hlo and b"Eigh" in hlo
    check_portable(hlo, "tpu")


def _renamed(target):
    """A module that calls "Qr" under another name."""
    module = HloModuleProto.FromString(lowered(lambda x: tf.linalg.qr(x)))
    for computation in module.computations:
        for instruction in computation.instructions:
            if instruction.custom_call_target == "Qr":
                instruction.custom_call_target = target
    return module.SerializeToString()


def test_kernels_of_a_tpu_pass_there_alone():
    check_portable(_renamed("tpu_custom_call"), "tpu")
    with pytest.raises(ValueError, match="'cuda', a step that calls tpu_custom_call"):
        check_portable(_renamed("tpu_custom_call"), "cuda")


def test_another_function_is_named_with_its_operation():
    with pytest.raises(
        ValueError, match=r"'cuda', a step that calls lapack_sgeqrf_ffi \(Qr '.*Qr'\)"
    ):
        check_portable(_renamed("lapack_sgeqrf_ffi"), "cuda")
