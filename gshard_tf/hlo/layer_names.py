"""From the names of operations in a program to the layers they belong to."""

import re
from typing import Any

import keras

from gshard_tf.compat.keras_layers import direct_sublayers

# A tree of names: a layer's name -> the tree of the layers in it.
Tree = dict[str, "Tree"]

_NUMBER = re.compile(r"_\d+$")


def layer_tree(model: keras.Model) -> Tree:
    """The names of a model's layers, and of its optimizer, nested as they are."""
    tree: Tree = {model.name: _children(model)}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        tree[optimizer.name] = {}
    return tree


def _children(layer: Any) -> Tree:
    children = direct_sublayers(layer)
    # Layers that a layer runs without owning them, such as the blocks of a stack.
    children += getattr(layer, "inner_layers", [])
    return {child.name: _children(child) for child in children}


class LayerNames:
    """Finds the layers of a model in the names of a program's operations."""

    def __init__(self, tree: Tree):
        self.tree = tree
        # Layers by their own name, where no other has it: what a loop computes for a
        # gradient is called after its innermost layers alone.
        self._unique = _by_name(tree)

    def layer_of(self, op_name: str) -> str:
        """The path of the innermost layer that an operation was made in, or "".

        An operation is called after the scopes around it, `.../encoder_2/moe_1/einsum`,
        where TensorFlow adds a number to a scope that it enters again.
        """
        path: list[str] = []
        tree = self.tree
        # Within a loop or a recomputation, gradients are called anew from the
        # outermost.
        for part in op_name.rpartition("gradients/")[2].split("/"):
            # Keras enters a layer's scope twice, the second time to call it, so a
            # number is TensorFlow's rather than the layer's own.
            for name in (_NUMBER.sub("", part), part):
                if name in tree:
                    path.append(name)
                    tree = tree[name]
                    break
                if not path and name in self._unique:
                    path, tree = list(self._unique[name][0]), self._unique[name][1]
                    break
        return "/".join(path)


def _by_name(tree: Tree) -> dict[str, tuple[tuple[str, ...], Tree]]:
    """The layers whose name no other has: name -> path and tree."""
    found: dict[str, list] = {}

    def visit(tree: Tree, path: tuple[str, ...]) -> None:
        for name, inner in tree.items():
            found.setdefault(name, []).append(((*path, name), inner))
            visit(inner, (*path, name))

    visit(tree, ())
    return {name: each[0] for name, each in found.items() if len(each) == 1}


def operation_of(op_name: str) -> str:
    """The last part of an operation's name, such as `einsum`."""
    return _NUMBER.sub("", op_name.rstrip("/").rpartition("/")[2])
