"""Seeds of the parts of a model, derived from one seed.

Two generators of one seed give the same numbers. So a layer never passes its seed to
several parts unchanged: a part's seed is a hash of the seed and the part's name. It
depends on nothing else, so the same arguments give the same seeds in any process.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import keras

# Keras takes seeds modulo 2**31 - 2 for some operations and uint32 words for others:
# below that no two become one.
_SEEDS = 2**31 - 2


def child_seed(seed: int | None, *path: str | int) -> int | None:
    """Returns the seed of one part of a layer or model with the seed `seed`.

    Args:
        seed: The seed of the whole. None: each part takes its own from Keras's global
            seed (`keras.utils.set_random_seed`), and so does this one.
        *path: The part's name, and the names of parts within it. Empty: the seed
            itself.

    Returns:
        An int in `[0, 2**31 - 2)`, or None.

    Raises:
        ValueError: for a seed that is no int.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int or None. Received: seed={seed!r}")
    if not path:
        return seed
    key = "/".join([str(seed), *(str(part) for part in path)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS


def child_initializer(
    initializer: str | Mapping[str, Any] | Callable | None, *path: str | int
) -> Any:
    """Returns a copy of an initializer for one weight, or one part of a model.

    Keras's initializers return the same values whenever they are called, so weights of
    one shape that share an initializer would start equal. Copies of one without a seed
    do not; copies of one with a seed get that of their `path`. An initializer
    with a `keras.random.SeedGenerator` gives new values at each call and is not copied.

    Args:
        initializer: Argument of `keras.initializers.get`.
        *path: As for `child_seed`.
    """
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    seed = config.get("seed")
    if isinstance(seed, int):
        config["seed"] = child_seed(seed, *path)
    elif seed is not None:
        return initializer
    return type(initializer).from_config(config)
