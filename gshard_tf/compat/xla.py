"""XLA's compiler: the options for a platform, and the errors that it reports."""

import re

# XLA's CPU compiler drops optimization barriers before it fuses, and so computes again
# what a barrier holds. Without that pass they stay to the end, and cost nothing there.
# On an upgrade, check that an `opt-barrier` is in the text of a compiled program: XLA
# ignores the name of a pass that it does not have. The other pass makes one kernel of a
# loop over little data, which cannot hold a barrier: the compiler would refuse it.
_CPU = {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}

# Calls by name that XLA itself expands on every platform, before any code is made: its
# annotations, and decompositions. On an upgrade, see that the table of
# `python -m benchmarks.platforms` has no other.
PORTABLE_CALLS = frozenset(
    {
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "Eigh",
        "ProductOfElementaryHouseholderReflectors",
        "Qr",
    }
)
# Those that the compiler of one platform has: Pallas kernels of a TPU, of which jax
# promises that an exported one stays valid.
PLATFORM_CALLS = {"tpu": frozenset({"tpu_custom_call"})}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """The options that programs are compiled with for a platform, such as "cpu".

    A TPU's and a GPU's compiler get none: their defaults are what their makers tune.
    """
    return {**_CPU} if platform == "cpu" else {}


def operation_that_failed(message: str) -> str | None:
    """The operation of the model that a compiler's error is about.

    Args:
        message: What the error says.

    Returns:
        The name of the TensorFlow operation; None where the compiler's verifier of HLO
        did not stop at an instruction with a name.
    """
    # The verifier's words and the metadata of an instruction: both are only said in
    # the text. On an upgrade, see that the test of a gather still finds its name.
    if "hlo verifier" not in message:
        return None
    found = re.search(r'op_name="(?:[^"]*PartitionedCall/)?([^"]+)"', message)
    return found[1] if found else None
