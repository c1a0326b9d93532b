"""The arguments of one `MoELayer` among many that are given the same ones."""

from collections.abc import Mapping
from typing import Any

from keras_layers._seeds import child_initializer, child_seed
from keras_layers.routing import ROUTERS


def moe_options_of(
    options: Mapping[str, Any], seed: int | None, *path: str | int
) -> dict[str, Any]:
    """`options` for the block that `path` names: seeds in them become its own.

    Args:
        options: Arguments of `MoELayer`, the same for all blocks.
        seed: The seed of all blocks, for options without one.
        *path: As for `child_seed`. Nothing: there is one block, whose seeds these are.
    """
    made = _own_seeds(options, path)
    router = options.get("router")
    if isinstance(router, Mapping):
        kind = ROUTERS.get(router.get("kind", "top2"))
        if kind is not None and kind.seed_is_a_choice:
            # One choice for all blocks.
            router = {"seed": options.get("seed", seed), **router}
        else:
            router = _own_seeds(router, path)
        made["router"] = router
    return made


def _own_seeds(
    arguments: Mapping[str, Any], path: tuple[str | int, ...]
) -> dict[str, Any]:
    made = dict(arguments)
    if path and "seed" in made:
        made["seed"] = child_seed(made["seed"], *path)
    initializer = made.get("kernel_initializer")
    # A name makes another initializer in each layer anyway.
    if path and not isinstance(initializer, str | None):
        made["kernel_initializer"] = child_initializer(initializer, *path)
    return made
