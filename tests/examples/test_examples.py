"""Each example of one file runs, in a short form, and shows what it says."""

import importlib.util
import re

import keras
import numpy as np
import parity
import pytest
from processes import run_python

import gshard_tf


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


def shrink(monkeypatch, example, **sizes):
    for name, size in sizes.items():
        monkeypatch.setattr(example, name, size)


def layout(printed, weight):
    """The layout in the line of `weight`, as `describe` prints it."""
    [found] = re.findall(rf"^{re.escape(weight)} +\S+ +(\S+)", printed, flags=re.M)
    return found


@pytest.mark.slow  # its notebook runs by default
@needs("sklearn")
def test_the_digits_are_learned_by_split_experts(monkeypatch, capsys):
    from gshard_examples import vision

    shrink(monkeypatch, vision, BLOCKS=1, WIDTH=16, HIDDEN=16)
    scores = vision.main(epochs=2, steps_per_epoch=40)
    # One of ten is right by chance.
    assert scores["accuracy"] > 0.5
    printed = capsys.readouterr().out
    assert "Of 448 images held out" in printed
    assert layout(printed, "moe_0/experts/wi") == "expert,-,-"
    assert layout(printed, "classes/kernel") == "-,-"


@pytest.mark.slow  # as test_upcycling_a_dense_checkpoint shows of a layer
def test_the_upcycled_model_starts_at_the_loss_of_the_dense_one(monkeypatch, capsys):
    from gshard_examples import upcycle

    shrink(monkeypatch, upcycle, BLOCKS=1, LENGTH=16, WIDTH=16, HIDDEN=32)
    losses = upcycle.main(dense_steps=30, sparse_steps=30)
    # It knows nothing at log(128).
    assert losses["dense"] < 4.0 < 4.85
    # The copies have noise of a percent.
    assert abs(losses["upcycled"] - losses["dense"]) < 0.01
    assert losses["sparse"] < losses["upcycled"] - 0.05
    printed = capsys.readouterr().out
    assert layout(printed, "feed_forward_0/experts/wo") == "expert,-,-"
    assert "dense_longer" in printed


@pytest.mark.slow
def test_the_language_model_learns_and_continues_a_text():
    printed = run_python(
        """
        from gshard_examples import language_model
        language_model.BLOCKS, language_model.WIDTH = 1, 32
        history = language_model.main(steps=50, continuation=20)
        for losses in history["loss"], history["val_loss"]:
            assert len(losses) == 5
            # It knows nothing at log(256).
            assert losses[-1] < losses[0] < 5.55, losses
        """
    )
    assert layout(printed, "moe_0/experts/wi") == "expert,-,-"
    assert len(printed.partition("The statement is ")[2]) >= 20


def trained_beside_one_device(example, steps, fall):
    """Runs an example whose first losses are those of one device, and then fall."""
    return run_python(
        f"""
        import numpy as np
        from gshard_examples import {example}
        losses, expected = {example}.main(steps={steps}, compared=5)
        np.testing.assert_allclose(losses[:5], expected, rtol=1e-4)
        assert losses[-1] < losses[0] - {fall}, losses
        """
    )


@pytest.mark.slow
@needs("keras_hub")
def test_a_gemma_split_by_paths_has_the_losses_of_plain_keras():
    printed = trained_beside_one_device("tensor_parallel", steps=20, fall=1)
    assert layout(printed, "token_embedding/embeddings") == "model,-"
    attention = "decoder_block_0/attention"
    assert layout(printed, f"{attention}/query/kernel") == "model,-,-"
    assert layout(printed, f"{attention}/attention_output/kernel") == "model,-,-"
    assert layout(printed, "decoder_block_0/ffw_gating_2/kernel") == "-,model"
    assert layout(printed, "decoder_block_0/ffw_linear/kernel") == "model,-"


@needs("official")
def test_a_bert_of_the_model_garden_trains_with_its_own_optimizer():
    printed = trained_beside_one_device("model_garden", steps=60, fall=0.1)
    block = "bert_encoder_v2/transformer/layer_0"
    assert layout(printed, f"{block}/self_attention/key/kernel") == "-,model,-"
    assert layout(printed, f"{block}/output/kernel") == "model,-"
    slot = "AdamWeightDecay/bert_encoder_v2/word_embeddings/embeddings/v"
    assert layout(printed, slot) == "model,-"


@pytest.mark.slow  # as the network of test_convolution.py does
def test_a_resnet_over_tiles_has_the_losses_and_weights_of_plain_keras(monkeypatch):
    from gshard_examples import spatial_resnet

    shrink(monkeypatch, spatial_resnet, SIZE=32, FILTERS=(8, 16))
    keras.backend.clear_session(free_memory=False)
    mesh = gshard_tf.create_mesh(spatial_resnet.MESH, "CPU")
    strategy = gshard_tf.SpmdStrategy(mesh, spatial_resnet.RULES)
    tiles, losses = spatial_resnet.train(strategy, 2)
    keras.backend.clear_session(free_memory=False)  # the same names again
    plain, expected = spatial_resnet.train(None, 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    parity.assert_same_state(tiles, plain, 1e-5)
    sent = strategy.programs[-1].collectives()
    assert {each.kind for each in sent} == {"collective-permute", "all-reduce"}
    # Three rows or columns, with corners, of a tile of the images [4, 32, 32, 3].
    halos = [each.bytes for each in sent if each.kind == "collective-permute"]
    assert max(halos) <= 4 * 3 * (16 + 5) * 3 * 4
