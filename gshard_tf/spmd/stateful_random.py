"""Random numbers whose state no program holds: a warning where a step draws them.

TensorFlow's older random operations keep their state in the runtime. XLA turns them
into instructions that do likewise, and every partition of a program advances that state
by itself, in whatever order they run: the numbers are not those of one device, and
another run makes others, whatever `tf.random.set_seed` says.
"""

import warnings
from typing import Any

#: Instructions that read a state which is neither an argument nor a result.
OPCODES = ("rng", "rng-get-and-update-state")

_INSTEAD = {
    "RandomUniform": "keras.random.uniform, or keras.random.dropout for a dropout",
    "RandomUniformInt": "keras.random.randint",
    "RandomStandardNormal": "keras.random.normal",
    "TruncatedNormal": "keras.random.truncated_normal",
    "RandomShuffle": "keras.random.shuffle",
    "Multinomial": "keras.random.categorical",
}

_warned: set[tuple[str, str]] = set()


def find_stateful_random(module: Any) -> list[tuple[str, str]]:
    """Type and name of each operation that draws from a hidden state, in their order.

    Args:
        module: A `HloModuleProto`.
    """
    operations = {
        (instruction.metadata.op_type, instruction.metadata.op_name): None
        for computation in module.computations
        for instruction in computation.instructions
        if instruction.opcode in OPCODES
    }
    return list(operations)


def warn_of_stateful_random(module: Any) -> None:
    """Warns of each such operation of a module, once in the life of the process."""
    for kind, name in find_stateful_random(module):
        if (kind, name) in _warned:
            continue
        _warned.add((kind, name))
        instead = _INSTEAD.get(kind, "a function of keras.random")
        warnings.warn(
            f"The step has the operation {kind} ({name!r}), whose random numbers are "
            "not reproducible: on several partitions they depend on the order in which "
            "these run, and no seed decides them. Use "
            f"{instead}, with seed=a keras.random.SeedGenerator that the layer holds; "
            "or gshard_tf.random, whose numbers each device makes for itself.",
            stacklevel=2,
        )
