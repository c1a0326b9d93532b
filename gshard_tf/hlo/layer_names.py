"""Maps the names of operations in a program to the layers of a model."""

import re

import keras

from gshard_tf.compat.keras_layers import direct_sublayers

# A tree of names: a layer's name -> the tree of the layers within it.
Tree = dict[str, "Tree"]

_NUMBER = re.compile(r"_\d+$")


def layer_tree(model: keras.Model) -> Tree:
    """Returns the nested names of a model's layers, and its optimizer's."""
    tree: Tree = {model.name: _children(model)}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        tree[optimizer.name] = {}
    return tree


def _children(layer: keras.layers.Layer) -> Tree:
    children = direct_sublayers(layer)
    # Layers that a layer runs without owning them, such as the blocks of a stack.
    children += getattr(layer, "inner_layers", [])
    return {child.name: _children(child) for child in children}


class LayerNames:
    """Finds the layers of a model in the names of a program's operations."""

    def __init__(self, tree: Tree):
        self.tree = tree
        # Layers by their own name, where it is unique: the gradient operations of a
        # loop are named after their innermost layers alone.
        self._unique = _by_name(tree)

    def layer_of(self, op_name: str) -> str:
        """Returns the path of the innermost layer that made an operation, or "".

        An operation is named after the scopes around it, `.../encoder_2/moe_1/einsum`.
        TensorFlow appends a number to a scope that it enters again.
        """
        path: list[str] = []
        tree = self.tree
        # Within a loop or a recomputation, the names of gradients start again at the
        # outermost layer.
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
    """Returns path and tree of each layer whose name is unique, by name."""
    places: dict[str, list] = {}

    def visit(tree: Tree, path: tuple[str, ...]) -> None:
        for name, inner in tree.items():
            places.setdefault(name, []).append(((*path, name), inner))
            visit(inner, (*path, name))

    visit(tree, ())
    return {name: each[0] for name, each in places.items() if len(each) == 1}


def operation_of(op_name: str) -> str:
    """Returns the last part of an operation's name, such as `einsum`."""
    return _NUMBER.sub("", op_name.rstrip("/").rpartition("/")[2])
