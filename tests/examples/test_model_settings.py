"""Every setting of model, mesh and optimizer reaches what it is a setting of."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_examples.translation import cli
from gshard_examples.translation.model import make_model, mesh_rules
from gshard_examples.translation.optimization import (
    DecayToZero,
    InverseSquareRoot,
    make_optimizer,
    make_schedule,
)
from gshard_examples.translation.resuming import check_same_run
from gshard_examples.translation.settings import Settings
from gshard_tf.spmd.abstract import AbstractStrategy

SMALL = {"model_dim": 32, "hidden_dim": 48, "heads": 2, "experts": 4}
VOCABULARY = types.SimpleNamespace(size=640)


def make(vocabulary=VOCABULARY, **settings):
    """The model of these settings, of which nothing is allocated."""
    settings = Settings(**SMALL | settings)
    mesh = gshard_tf.create_mesh(settings.mesh_axes)
    with AbstractStrategy(mesh).scope():
        return make_model(settings, vocabulary)


def expert_layers(model):
    return [
        block.feed_forward
        for block in [*model.encoder_blocks, *model.decoder_blocks]
        if block.num_experts
    ]


@pytest.mark.parametrize(("key_dim", "billions"), [("64", 2.313), ("128", 2.917)])
def test_the_weights_of_the_papers_dense_model(key_dim, billions):
    """T(96L), with flags; its vocabularies of 64,000 and 32,000 as one."""
    flags = (
        "--encoder-layers 48 --decoder-layers 48 --model-dim 1024 --hidden-dim 8192 "
        f"--heads 16 --experts 0 --vocab-size 96000 --key-dim {key_dim}"
    )
    options = cli.make_parser().parse_args(["train", *flags.split()])
    settings = vars(cli._settings(options))
    model = make(types.SimpleNamespace(size=settings["vocab_size"]), **settings)
    assert model.count_params() / 1e9 == pytest.approx(billions, abs=5e-4)
    # By hand: attention, feed-forward, one scale and one offset per normalization.
    m, h, nd, layers = 1024, 8192, 16 * int(key_dim), 48
    norms = 2 * m * (2 * layers + 3 * layers + 2)
    attention, dense = 4 * m * nd, 2 * m * h
    blocks = layers * (3 * attention + 2 * dense)
    assert abs(model.count_params() - 96_000 * m - blocks - norms) < 1e-3 * blocks


def test_a_head_is_as_wide_as_asked():
    model = make(key_dim=24)
    attention = model.encoder_blocks[0].self_attention
    assert (attention.num_heads, attention.key_dim) == (2, 24)
    assert make().encoder_blocks[0].self_attention.key_dim == 16


@pytest.mark.parametrize(
    ("setting", "argument"),
    [("none", False), ("attention", "attention"), ("all", True)],
)
def test_what_is_computed_again(setting, argument):
    model = make(remat=setting)
    assert {block.remat for block in model.encoder_blocks} == {argument}
    assert {block.remat for block in model.decoder_blocks} == {argument}


def test_stacked_blocks():
    deep = {"encoder_layers": 4, "decoder_layers": 4}
    model = make(stacked=True, **deep)
    assert model.stacked and model.count_params() == make(**deep).count_params()


def test_the_experts_settings():
    layers = expert_layers(make(aux_loss_coef=0.05, expert_dropout=0.4, dropout=0.2))
    assert len(layers) == 2
    for layer in layers:
        assert layer.aux_loss_coef == 0.05
        assert layer.experts.dropout.rate == 0.4
    for layer in expert_layers(make()):
        assert layer.aux_loss_coef == 0.01
        assert layer.experts.dropout.rate == 0.0


def test_the_losss_settings():
    loss = make(label_smoothing=0.1, z_loss=1e-4).loss
    assert (loss.label_smoothing, loss.z_loss) == (0.1, 1e-4)
    assert (make().loss.label_smoothing, make().loss.z_loss) == (0.0, 0.0)


# ------------------------------------------------------------------------ the mesh


@pytest.mark.parametrize(
    ("settings", "axes", "rules"),
    [
        ({"partitions": 0}, {}, {}),
        (
            {"partitions": 8},
            {"expert": 8},
            {"batch": "expert", "group": "expert", "expert": "expert"},
        ),
        (
            {"mesh": "data=2, expert=4"},
            {"data": 2, "expert": 4},
            {"batch": "data", "group": "data", "expert": "expert"},
        ),
        (
            {"mesh": "data=4,model=2"},
            {"data": 4, "model": 2},
            {"batch": "data", "group": "data", "expert": "data"}
            | dict.fromkeys(("mlp", "heads", "vocab"), "model"),
        ),
        ({"mesh": "data=2", "experts": 0}, {"data": 2}, {"batch": "data"}),
    ],
)
def test_the_axes_of_a_mesh(settings, axes, rules):
    settings = Settings(**settings)
    assert settings.mesh_axes == axes
    found = mesh_rules(settings).rules
    assert {logical: axis for logical, axis in found.items() if axis} == rules


@pytest.mark.parametrize(
    "mesh", ["8", "expert", "expert=0", "expert=-1", "rows=2", "data=2,data=2", ","]
)
def test_other_meshes_are_refused(mesh):
    with pytest.raises(ValueError, match="mesh must be sizes of some of the axes"):
        Settings(mesh=mesh)


# ------------------------------------------------------------------- the optimizer


def test_the_optimizers_settings():
    adam = make_optimizer(Settings(beta_2=0.9, clip_norm=0.5))
    assert (adam.beta_2, adam.global_clipnorm) == (0.9, 0.5)
    assert make_optimizer(Settings()).global_clipnorm is None
    adamw = make_optimizer(Settings(optimizer="adamw", weight_decay=0.1, beta_2=0.9))
    assert (adamw.weight_decay, adamw.beta_2) == (0.1, 0.9)
    adafactor = make_optimizer(Settings(optimizer="adafactor", clip_norm=2.0))
    assert adafactor.global_clipnorm == 2.0


def test_clipped_gradients_are_of_the_norm_asked_for():
    """One SGD-like look: with Adam's first step any scale gives the same update."""
    optimizer = make_optimizer(Settings(clip_norm=0.5))
    clipped = optimizer._clip_gradients(
        [tf.constant([3.0, 0.0]), tf.constant([[0.0], [4.0]])]
    )
    np.testing.assert_allclose(
        np.concatenate([np.ravel(g) for g in clipped]), [0.3, 0.0, 0.0, 0.4], rtol=1e-6
    )


def rates(schedule, steps):
    return np.array([float(schedule(tf.constant(step))) for step in steps])


def test_the_schedule_is_the_papers():
    flat = make_schedule(Settings(schedule="flat", learning_rate=0.01, warmup=10_000))
    np.testing.assert_allclose(
        rates(flat, [0, 9_999, 39_999]), [0.01, 0.01, 0.005], rtol=1e-6
    )
    linear = make_schedule(Settings(learning_rate=1e-3, warmup=100))
    assert rates(linear, [49])[0] == pytest.approx(5e-4)


@pytest.mark.parametrize("name", ["cosine", "linear-to-zero"])
def test_schedules_that_end_at_zero(name):
    settings = Settings(schedule=name, learning_rate=1.0, warmup=10, steps=100)
    schedule = make_schedule(settings)
    found = rates(schedule, range(101))
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
    # The 101st step would have a rate of 0; down there in 91 steps from the 10th.
    done = np.arange(92) / 91
    down = np.cos(np.pi * done) / 2 + 0.5 if name == "cosine" else 1 - done
    np.testing.assert_allclose(found[9:], down, atol=1e-6)
    assert found[99] > 0


def test_a_short_run_warms_up_for_half_of_its_steps():
    short = {"steps": 10, "steps_per_epoch": 10}
    settings = Settings(schedule="cosine", learning_rate=1.0, warmup=200, **short)
    assert np.argmax(rates(make_schedule(settings), range(10))) == 4


@pytest.mark.parametrize(
    "schedule", [InverseSquareRoot(1.0, 3), DecayToZero(1.0, 3, 9)]
)
def test_schedules_come_back_from_their_config(schedule):
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(schedule)
    )
    np.testing.assert_array_equal(rates(again, range(9)), rates(schedule, range(9)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_dim": -1},
        {"aux_loss_coef": -0.1},
        {"weight_decay": -1.0},
        {"clip_norm": -1.0},
        {"expert_dropout": 1.0},
        {"dropout": -0.1},
        {"beta_2": 1.0},
        {"label_smoothing": 1.0},
        {"z_loss": -1e-4},
        {"remat": "some"},
        {"schedule": "sine"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Settings(**wrong)


def test_a_run_that_ends_at_zero_is_not_extended(tmp_path):
    Settings(schedule="cosine").write(tmp_path)
    vocabulary = types.SimpleNamespace(sha256="")
    check_same_run(tmp_path, Settings(schedule="cosine"), vocabulary)
    with pytest.raises(ValueError, match="steps=1500 must stay"):
        check_same_run(tmp_path, Settings(schedule="cosine", steps=2000), vocabulary)
    with pytest.raises(ValueError, match="schedule='cosine', which must stay"):
        check_same_run(tmp_path, Settings(), vocabulary)


def test_every_setting_is_a_flag():
    flags = {"--stacked": True, "--key-dim": 8, "--schedule": "cosine"}
    given = [
        x
        for flag, value in flags.items()
        for x in ([flag] if value is True else [flag, str(value)])
    ]
    options = cli.make_parser().parse_args(["train", *given])
    assert cli._settings(options) == Settings(
        stacked=True, key_dim=8, schedule="cosine"
    )
    assert not cli.make_parser().parse_args(["train", "--no-stacked"]).stacked
