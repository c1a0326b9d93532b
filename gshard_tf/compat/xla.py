"""What XLA has no public and stable form of: options, its text, its errors."""

import re

# XLA's CPU compiler drops optimization barriers before it fuses, and so computes again
# what a barrier holds. Without that pass they stay to the end, and cost nothing there.
# On an upgrade, check that an `opt-barrier` is in the text of a compiled program: XLA
# ignores the name of a pass that it does not have.
_CPU = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(platform: str) -> dict[str, str]:
    """The options that programs are compiled with for a platform, such as "cpu"."""
    return dict(_CPU) if platform == "cpu" else {}


def hlo_as_text(hlo: bytes) -> str:
    """The text of a serialised HLO module."""
    # jaxlib's own printer of its modules has no public name. It is in `_hlo` since
    # jaxlib 0.10, and was in `_jax` before. On an upgrade, see that it is still there.
    try:
        from jaxlib import _hlo
    except ImportError:
        from jaxlib import _jax as _hlo

    options = _hlo.HloPrintOptions()
    options.print_metadata = True  # which operation each instruction stems from
    module = _hlo.HloModule.from_serialized_hlo_module_proto(hlo)
    return module.to_string(options)


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
