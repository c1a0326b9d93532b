"""One seed gives every generator, and every weight, numbers of its own."""

import inspect
import itertools
import random

import keras
import numpy as np
import pytest

import keras_layers
from keras_layers import (
    DecoderBlock,
    Dropout,
    EncoderBlock,
    ExpertChoiceRouter,
    Experts,
    FeedForward,
    HashRouter,
    MoELayer,
    MultiHeadAttention,
    Router,
    Top2Router,
    TopKRouter,
    Transformer,
)

MOE = {"dropout": 0.1, "num_shared_experts": 1, "router": {"jitter": 0.1}}
SEEDED_MOE = {"dropout": 0.1, "seed": 5, "router": {"kind": "top_k", "seed": 5}}
M = 8  # width


def transformer(**options):
    return Transformer(
        11, 11, 2, 1, M, 8, 2, num_experts=2, moe_every=1, dropout=0.5, **options
    )


# What takes a seed, with as many generators as it can have.
MAKE = {
    "Dropout": lambda **kw: Dropout(0.5, **kw),
    "FeedForward": lambda **kw: FeedForward(4, dropout=0.5, **kw),
    "MultiHeadAttention": lambda **kw: MultiHeadAttention(2, 4, dropout=0.5, **kw),
    "Experts": lambda **kw: Experts(2, 4, dropout=0.5, **kw),
    "Top2Router": lambda **kw: Top2Router(2, **kw),
    "TopKRouter": lambda **kw: TopKRouter(2, **kw),
    "ExpertChoiceRouter": lambda **kw: ExpertChoiceRouter(2, **kw),
    "HashRouter": lambda **kw: HashRouter(2, **kw),
    "Router": lambda **kw: Router(2, **kw),
    "MoELayer": lambda **kw: MoELayer(2, 4, **MOE, **kw),
    "EncoderBlock": lambda **kw: EncoderBlock(2, 4, 8, 2, 0.5, MOE, **kw),
    "EncoderBlock dense": lambda **kw: EncoderBlock(2, 4, 8, dropout=0.5, **kw),
    "EncoderBlock remat": lambda **kw: EncoderBlock(
        2, 4, 8, 2, 0.5, MOE, remat=True, **kw
    ),
    "DecoderBlock": lambda **kw: DecoderBlock(2, 4, 8, 2, 0.5, MOE, **kw),
    "Transformer": lambda **kw: transformer(moe_options=MOE, **kw),
    "Transformer stacked": lambda **kw: transformer(
        moe_options=MOE, stacked=True, remat=True, **kw
    ),
    "Transformer remat": lambda **kw: transformer(
        moe_options=MOE, remat="attention", **kw
    ),
    "Transformer options": lambda **kw: transformer(moe_options=SEEDED_MOE, **kw),
}


def states(layer):
    """The state `[2]` of each generator in a layer, in their order."""
    if isinstance(layer, Transformer) and not layer.built:
        layer.build()
    found = [v.numpy() for v in layer.variables if "seed_generator_state" in v.path]
    return [tuple(row) for state in found for row in state.reshape(-1, 2).tolist()]


def test_every_layer_with_a_seed_is_here():
    public = (getattr(keras_layers, name) for name in keras_layers.__all__)
    layers = [
        each
        for each in public
        if inspect.isclass(each) and issubclass(each, keras.layers.Layer)
    ]
    seeded = {
        each.__name__
        for each in layers
        if issubclass(each, Router)
        or any(
            "seed" in inspect.signature(base.__init__).parameters
            for base in each.__mro__
            if base.__module__.startswith("keras_layers")
        )
    }
    assert seeded == {name.split(" ")[0] for name in MAKE}


@pytest.mark.broad(2)
@pytest.mark.parametrize("name", MAKE)
def test_a_seed_gives_different_generators_and_the_same_again(name):
    make = MAKE[name]
    first = states(make(seed=7))
    assert len(first) == len(set(first)), "two generators begin equal"
    assert len(first) == len(states(make()))
    # Neither names, nor what was made before, nor the global seed changes them.
    keras.utils.set_random_seed(99)
    [keras.layers.Dropout(0.5) for _ in range(3)]
    random.random()
    assert states(make(seed=7)) == first
    if name != "Transformer options":  # which has seeds of its own
        assert not set(states(make(seed=8))) & set(first)


@pytest.mark.broad(2)
@pytest.mark.parametrize("name", [n for n in MAKE if n != "Router"])
def test_a_config_gives_the_same_generators(name):
    layer = MAKE[name](seed=7)
    again = type(layer).from_config(layer.get_config())
    assert states(again) == states(layer)
    twice = type(layer).from_config(again.get_config())
    assert states(twice) == states(layer)


def test_a_saved_model_gives_the_same_generators(tmp_path):
    model = MAKE["Transformer"](seed=7)
    fresh = states(model)
    model.save(tmp_path / "model.keras")
    assert states(keras.saving.load_model(tmp_path / "model.keras")) == fresh
    assert len(fresh) > 15


def test_without_a_seed_the_global_one_decides():
    keras.utils.set_random_seed(3)
    first = states(MAKE["Transformer"]())
    keras.utils.set_random_seed(3)
    assert states(MAKE["Transformer"]()) == first
    assert len(first) == len(set(first))
    keras.utils.set_random_seed(4)
    assert not set(states(MAKE["Transformer"]())) & set(first)


def test_stacked_layers_draw_what_single_ones_do():
    assert sorted(states(MAKE["Transformer stacked"](seed=7))) == sorted(
        states(MAKE["Transformer"](seed=7))
    )


def test_layers_of_a_transformer_drop_different_choices():
    """With equal gates, only chance decides whose second expert is kept."""
    model = transformer(moe_options={"router": {"capacity_factor": "dropless"}}, seed=7)
    model.build()
    routers = [b.feed_forward.router for b in model.encoder_blocks]
    x = np.random.default_rng(0).normal(size=[4, 64, M]).astype("float32")
    for router in routers:
        router.kernel.assign(routers[0].kernel)
    kept = [r(x, training=True)[0].dispatched.numpy()[..., 1] for r in routers]
    assert 0.2 < kept[0].mean() < 0.99
    assert np.mean(kept[0] == kept[1]) < 0.9


def test_a_hash_is_chosen_for_all_layers():
    """The seed of a hash says where tokens go, so a trained model depends on it."""
    hashed = {"router": {"kind": "hash"}}
    for options, seed, chosen in (
        (hashed, 7, 7),
        (hashed, None, None),
        ({**hashed, "seed": 5}, 7, 5),
        ({"router": {"kind": "hash", "seed": 4}}, 7, 4),
    ):
        model = transformer(moe_options=options, seed=seed)
        blocks = [*model.encoder_blocks, *model.decoder_blocks]
        assert [b.feed_forward.router.seed for b in blocks] == [chosen] * 3
    assert MoELayer(2, 4, router={"kind": "hash"}, seed=7).router.seed == 7


@pytest.mark.parametrize("seed", [1.5, True, "7", [1, 2]])
def test_a_seed_is_an_int(seed):
    with pytest.raises(ValueError, match="seed must be an int or None. Received: seed"):
        EncoderBlock(2, 4, 8, seed=seed)


WITH_WEIGHTS = {
    "attention": (lambda i: MultiHeadAttention(2, M // 2, kernel_initializer=i), 1),
    "feed_forward": (lambda i: FeedForward(M, gated=True, kernel_initializer=i), 1),
    "experts": (lambda i: Experts(2, M, gated=True, kernel_initializer=i), 1),
    "moe": (
        lambda i: MoELayer(
            2, M, gated=True, num_shared_experts=1, kernel_initializer=i
        ),
        1,
    ),
    "transformer": (
        lambda i: transformer(
            moe_options={"kernel_initializer": i, "router": {"kernel_initializer": i}}
        ),
        0,
    ),
    "stacked": (
        lambda i: transformer(
            moe_options={"kernel_initializer": i, "router": {"kernel_initializer": i}},
            stacked=True,
            remat=True,
        ),
        0,
    ),
}
INITIALIZERS = {
    "seeded": lambda: keras.initializers.GlorotUniform(seed=3),
    "seeded normal": lambda: keras.initializers.RandomNormal(seed=3),
    "config": lambda: keras.initializers.serialize(
        keras.initializers.GlorotUniform(seed=3)
    ),
    "one instance": lambda: keras.initializers.GlorotUniform(),
    "generator": lambda: keras.initializers.GlorotUniform(
        seed=keras.random.SeedGenerator(3)
    ),
}


def random_weights(name, initializer):
    make, built_by_shape = WITH_WEIGHTS[name]
    layer = make(initializer)
    layer.build((None, None, None, M)) if name == "experts" else (
        layer.build((None, None, M)) if built_by_shape else layer.build()
    )
    found = []
    for weight in layer.trainable_weights:
        value = weight.numpy()
        if np.ptp(value) == 0:  # scales and offsets of normalization
            continue
        stacked = name == "stacked" and ("encoder" in weight.path) | (
            "decoder" in weight.path
        )
        found += list(value) if stacked else [value]
    return found


@pytest.mark.broad(2)
@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_no_two_weights_of_one_shape_start_equal(name, initializer):
    weights = random_weights(name, INITIALIZERS[initializer]())
    assert len(weights) > 2
    for a, b in itertools.combinations(weights, 2):
        if a.shape == b.shape:
            assert not np.array_equal(a, b)


@pytest.mark.parametrize("name", ["attention", "moe"])
def test_a_seeded_initializer_gives_the_same_again(name):
    first = random_weights(name, keras.initializers.GlorotUniform(seed=3))
    keras.utils.set_random_seed(99)
    again = random_weights(name, keras.initializers.GlorotUniform(seed=3))
    seeded = [np.array_equal(a, b) for a, b in zip(first, again, strict=True)]
    # The router's initializer is another one, without a seed.
    assert seeded.count(False) == (1 if name == "moe" else 0)


def test_a_config_keeps_the_initializer_that_was_given():
    layer = MoELayer(2, 4, kernel_initializer=keras.initializers.GlorotUniform(seed=3))
    layer.build((None, None, M))
    config = layer.get_config()["kernel_initializer"]
    assert config["config"]["seed"] == 3
    again = MoELayer.from_config(layer.get_config())
    again.build((None, None, M))
    np.testing.assert_array_equal(again.experts.wi, layer.experts.wi)
