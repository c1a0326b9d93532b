"""Layers like those of published models: an oracle, and transformers' own blocks."""

import importlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import published_blocks

from keras_layers import MoELayer, assign_transformers_weights

B, L, M, H, E = 2, 10, 8, 6, 16

#: By convention: our arguments besides, the oracle's, transformers' model, its block
#: and its config's.
MODELS = {
    "mixtral": (
        {},
        {"k": 2},
        ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
        {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size": H},
    ),
    "qwen2_moe": (
        {},
        {"k": 4, "normalize": False},
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"),
        {
            "num_experts": E,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "moe_intermediate_size": H,
            "shared_expert_intermediate_size": 4 * H,
        },
    ),
    "qwen3_moe": (
        {},
        {"k": 8},
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
        {
            "num_experts": E,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "moe_intermediate_size": H,
        },
    ),
    "deepseek_v2": (
        {"router": {"k": 3}},
        {
            "k": 3,
            "normalize": False,
            "scale": 16.0,
            "groups": 8,
            "groups_per_token": 3,
        },
        ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config"),
        {
            # The router reads one of the names, the experts the other.
            "n_routed_experts": E,
            "num_experts": E,
            "num_experts_per_tok": 3,
            "num_attention_heads": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 2,
            "moe_intermediate_size": H,
        },
    ),
    "deepseek_v3": (
        {"router": {"k": 5}},
        {
            "k": 5,
            "sigmoid": True,
            "scale": 2.5,
            "groups": 8,
            "groups_per_token": 4,
            "best_of_group": 2,
        },
        ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
        {
            "n_routed_experts": E,
            "num_experts_per_tok": 5,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "moe_intermediate_size": H,
        },
    ),
}


def _layer(name):
    layer = MoELayer.as_in(name, E, H, **MODELS[name][0])
    layer.build((B, L, M))
    return layer


def _state(name):
    """Random weights by transformers' names."""
    rng = np.random.default_rng(1)
    shapes = {
        "gate.weight": (E, M),
        "experts.gate_up_proj": (E, 2 * H, M),
        "experts.down_proj": (E, M, H),
    }
    layer = _layer(name)
    if layer.router.bias is not None:
        shapes["gate.e_score_correction_bias"] = (E,)
    if layer.shared_expert_gate:
        shapes["shared_expert_gate.weight"] = (1, M)
    if layer.num_shared_experts:
        prefix = "shared_expert" if layer.shared_expert_gate else "shared_experts"
        width = layer.num_shared_experts * H
        shapes[f"{prefix}.gate_proj.weight"] = (width, M)
        shapes[f"{prefix}.up_proj.weight"] = (width, M)
        shapes[f"{prefix}.down_proj.weight"] = (M, width)
    return {
        name: rng.normal(size=shape).astype(np.float32) * 0.5
        for name, shape in shapes.items()
    }


def _batch():
    return np.random.default_rng(0).normal(size=(2, B, L, M)).astype(np.float32)


def _assert_close(value, expected):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale)


def _block(name):
    """A layer with the weights of a published block, inputs, and what that returns."""
    layer, state = _layer(name), _state(name)
    assign_transformers_weights(layer, state)
    x, _ = _batch()
    expected = published_blocks.block(x.reshape(-1, M), state, **MODELS[name][1])
    return layer, x, expected.reshape(x.shape)


@pytest.mark.broad(5)  # other routings, not other products of the experts' rows
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_papers_block_without_buffers(name):
    layer, x, expected = _block(name)
    assert layer.dispatcher == "dropless"
    _assert_close(layer(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_papers_block(name):
    layer, x, expected = _block(name)
    layer.dispatcher = "index"
    _assert_close(layer(x), expected)
    config = layer.get_config()
    loaded = MoELayer.from_config(config)
    loaded.build((B, L, M))
    loaded.set_weights(layer.get_weights())
    assert loaded.get_config() == config
    _assert_close(loaded(x, decoding=True), expected)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_block(name):
    needs = "installed by: pip install 'gshard-tf[benchmarks]'"
    torch = pytest.importorskip("torch", reason=needs)
    transformers = pytest.importorskip("transformers", reason=needs)
    _, _, (folder, block, config), options = MODELS[name]
    modeling = importlib.import_module(
        f"transformers.models.{folder}.modeling_{folder}"
    )
    config = getattr(transformers, config)(hidden_size=M, **options)
    block = getattr(modeling, block)(config)
    state = {key: torch.tensor(value) for key, value in _state(name).items()}
    block.load_state_dict(state, strict=True)
    x, target = _batch()
    theirs = torch.tensor(x, requires_grad=True)
    outputs = block(theirs)
    (outputs * torch.tensor(target)).sum().backward()

    layer, inputs = _layer(name), tf.constant(x)
    assign_transformers_weights(layer, block.state_dict())
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layer(inputs)
        loss = tf.reduce_sum(y * target)
    weights = [weight.value for weight in layer.trainable_variables]
    d_inputs, *gradients = tape.gradient(loss, [inputs, *weights])
    _assert_close(y, outputs.detach().numpy())
    _assert_close(d_inputs, theirs.grad.numpy())
    # Their gradients come to the places of the weights, as the weights do.
    other = _layer(name)
    gradients_of = {key: weight.grad for key, weight in block.named_parameters()}
    assign_transformers_weights(other, {**state, **gradients_of})
    for gradient, variable in zip(gradients, other.trainable_variables, strict=True):
        expected = keras.ops.convert_to_numpy(variable)
        assert np.abs(expected).max() > 0
        _assert_close(gradient, expected)


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), "gate_proj up_proj down_proj"])
def test_experts_one_by_one(names):
    gate, up, down = names.split() if isinstance(names, str) else names
    state = _state("mixtral")
    together, apart = _layer("mixtral"), _layer("mixtral")
    assign_transformers_weights(together, state)
    both, downs = (state.pop(f"experts.{n}") for n in ("gate_up_proj", "down_proj"))
    for e in range(E):
        state[f"experts.{e}.{gate}.weight"], state[f"experts.{e}.{up}.weight"] = (
            np.split(both[e], 2)
        )
        state[f"experts.{e}.{down}.weight"] = downs[e]
    assign_transformers_weights(apart, state)
    for weight, expected in zip(apart.weights, together.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_arguments_go_before_the_convention():
    layer = MoELayer.as_in(
        "deepseek_v3", 16, 4, router={"k": 2, "scores": "softmax"}, aux_loss_coef=0.5
    )
    assert layer.router.k == 2 and layer.router.scores == "softmax"
    assert layer.router.weight_scale == 2.5 and layer.aux_loss_coef == 0.5
    with pytest.raises(ValueError, match="convention must be one of"):
        MoELayer.as_in("gpt", 8, 4)
    with pytest.raises(ValueError, match="needs shared experts"):
        MoELayer(8, 4, shared_expert_gate=True)


def test_weights_that_do_not_fit():
    layer, state = _layer("mixtral"), _state("mixtral")
    before = layer.get_weights()
    cases = {
        "must be of shape": {**state, "gate.weight": np.zeros((E, M + 1), "f")},
        "must be of weights of": {**state, "shared_experts.w": np.zeros(1)},
        "must have 'gate.weight'": {"experts.down_proj": np.zeros(1)},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            assign_transformers_weights(layer, wrong)
    for weight, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    with pytest.raises(ValueError, match="must be built and gated"):
        assign_transformers_weights(MoELayer(8, 4), state)
