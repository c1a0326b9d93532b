"""Arguments of one `MoELayer` among many that share them."""

from collections.abc import Mapping
from typing import Any

from keras_layers._seeds import child_initializer, child_seed
from keras_layers.routing import ROUTERS


def block_moe_options(
    options: Mapping[str, Any], seed: int | None, *path: str | int
) -> dict[str, Any]:
    """Returns `options` with seeds of its own for the block that `path` names.

    Args:
        options: Arguments of `MoELayer`, the same for all blocks.
        seed: The seed of all blocks, for options without one.
        *path: As for `child_seed`. Empty: the seeds stay, for a single block.
    """
    block_options = _own_seeds(options, path)
    router = options.get("router")
    if isinstance(router, Mapping):
        kind = ROUTERS.get(router.get("kind", "top2"))
        if kind is not None and kind.seed_is_a_choice:
            # One choice for all blocks.
            router = {"seed": options.get("seed", seed), **router}
        else:
            router = _own_seeds(router, path)
        block_options["router"] = router
    return block_options


def _own_seeds(
    arguments: Mapping[str, Any], path: tuple[str | int, ...]
) -> dict[str, Any]:
    arguments = dict(arguments)
    if path and "seed" in arguments:
        arguments["seed"] = child_seed(arguments["seed"], *path)
    initializer = arguments.get("kernel_initializer")
    # A name makes another initializer in each layer anyway.
    if path and not isinstance(initializer, str | None):
        arguments["kernel_initializer"] = child_initializer(initializer, *path)
    return arguments
