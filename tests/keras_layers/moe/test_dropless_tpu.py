"""Dropless experts, compiled for a TPU."""

import importlib.util

import pytest
from processes import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)

CODE = """
    import keras, tensorflow as tf
    import gshard_tf
    from keras_layers import MoELayer

    experts, tokens, width, hidden = 8, 8 * 512, 256, 512

    def build():
        inputs = keras.Input((512, width))
        x = keras.layers.Dense(width)(inputs)
        layer = MoELayer(
            experts, hidden, router={{"kind": "top_k", "k": 2}}, dispatcher="dropless",
            seed=0, name="moe", dtype="{policy}",
        )
        model = keras.Model(inputs, layer(x), name="model")
        model.compile("sgd", "mse")
        return model

    rules = gshard_tf.AxisRules({rules}) if {rules} else None
    x = tf.TensorSpec([8, 512, width], tf.float32)
    plan = gshard_tf.plan(
        build, "{topology}", batch=(x, x), cache=False, mesh={mesh}, rules=rules
    )
    # Two choices a token, six products, two operations each, on one of 8 cores.
    products = 2 * tokens * 6 * 2 * width * hidden / 8
    found = sum(
        flops for layer, flops in plan.flops_by_layer.items()
        if layer.startswith("model/moe/experts")
    )
    print(found / products, plan.count("all-gather", "model/moe"))
    print(plan.count("all-to-all", "model/moe") > 0)
"""


@pytest.mark.parametrize(
    ("topology", "policy", "mesh", "rules", "expected"),
    [
        ("v5e:2x4", "float32", {"expert": 8}, {}, 1),
        pytest.param(
            "v5e:2x4",
            "mixed_bfloat16",
            {"expert": 4, "model": 2},
            {"batch": "expert", "group": "expert", "expert": "expert", "mlp": "model"},
            17 / 16,  # one of 16 tiles has rows of both experts of a core
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernels_compute_the_routed_rows(topology, policy, mesh, rules, expected):
    """And no weight is gathered."""
    code = CODE.format(topology=topology, policy=policy, mesh=mesh, rules=rules)
    ratio, gathers, exchanged = run_python(code).split()[-3:]
    assert float(ratio) == expected
    assert (gathers, exchanged) == ("0", "True")
