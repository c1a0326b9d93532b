"""Weight gradients copy their narrow operand on a CPU, and are the same numbers."""

import re

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.spmd import program

# Equation, and the shapes of its operands: the first is wide, the second is narrow.
GRADIENTS = [
    ("BTV,BTM->VM", (4, 6, 96), (4, 6, 8)),
    ("NV,NM->VM", (24, 96), (24, 8)),
    ("NV,NM->MV", (24, 96), (24, 8)),
    ("BLND,BLM->NDM", (4, 6, 8, 12), (4, 6, 8)),
    ("BLND,BLM->MND", (4, 6, 8, 12), (4, 6, 8)),
    ("ECH,ECM->EHM", (8, 16, 96), (8, 16, 8)),
    ("NM,NV->MV", (24, 8), (24, 96)),
]


def products(equation, shapes, devices):
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=shape).astype("float32") for shape in shapes]

    @tf.function(autograph=False)
    def product(wide, narrow):
        # Not parameters, which have a layout that is given.
        wide = gshard_tf.split(tf.sin(wide), 0, devices)
        return tf.einsum(equation, wide, tf.cos(narrow))

    strategy = parity.strategy_of({"data": devices})
    got = strategy.run(product, args=tuple(map(tf.constant, operands)))
    expected = np.einsum(equation, np.sin(operands[0]), np.cos(operands[1]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    return strategy.programs[-1].compiled.as_text()


def transposed_elements(text):
    """Sizes of what the compiled program writes in another order."""
    pattern = r"= f32\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(.*(?:copy|transpose)"
    found = [re.search(pattern, line) for line in text.splitlines()]
    return [np.prod(list(map(int, m[1].split(",")))) for m in found if m]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("equation", "wide", "narrow"), GRADIENTS)
def test_products_are_those_of_numpy(equation, wide, narrow, devices):
    products(equation, (wide, narrow), devices)


def test_the_wide_operand_is_not_copied(monkeypatch):
    shapes = (4, 60, 96), (4, 60, 8)
    size = np.prod(shapes[0])
    text = products("BTV,BTM->VM", shapes, 1)
    assert size not in transposed_elements(text)
    monkeypatch.setattr(program, "fast_on_cpu", lambda hlo: hlo)
    assert size in transposed_elements(products("BTV,BTM->VM", shapes, 1))
