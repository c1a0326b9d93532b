"""Functions of one platform that a module calls by name."""

from gshard_tf.compat.xla import PLATFORM_CALLS, PORTABLE_CALLS
from gshard_tf.compat.xla_protos import HloModuleProto


def check_portable(hlo: bytes, platform: str) -> None:
    """Checks that a module, which is lowered for the CPU, may be compiled for another.

    Args:
        hlo: A serialized `HloModuleProto`.
        platform: The platform that it is to be compiled for, for the message.

    Raises:
        ValueError: when it calls a function by a name that is not XLA's own, or one of
            the platform's: the function may be there on CPUs alone.
    """
    known = PORTABLE_CALLS | PLATFORM_CALLS.get(platform, frozenset())
    foreign = {
        f"{instruction.custom_call_target} ({instruction.metadata.op_type} "
        f"{instruction.metadata.op_name!r})"
        for computation in HloModuleProto.FromString(hlo).computations
        for instruction in computation.instructions
        if instruction.opcode == "custom-call"
        and instruction.custom_call_target not in known
    }
    if foreign:
        raise ValueError(
            "A step must not call functions of the CPU to run on another platform. "
            "Replace the operation, or move it into the input pipeline or a callback. "
            f"Received: for the platform {platform!r}, a step that calls "
            f"{', '.join(sorted(foreign))}"
        )
