# %% [markdown]
"""# A vision mixture of experts on scikit-learn's digits: patches, experts, accuracy

An image of 8 x 8 pixels is 16 patches of 2 x 2, which are the tokens of two blocks of
attention and experts (V-MoE, arXiv 2106.05974). The devices are 8 virtual ones of the
CPU; on GPUs, leave `request_cpu_devices` and `device_type="CPU"` out. Needs
scikit-learn, which ships the images: it is in the extra `translation`. As a script:
`python -m gshard_examples.vision`.
"""

# %% tags=["active-ipynb"]
# from importlib.util import find_spec
#
# if find_spec("gshard_tf") is None:  # a checkout, or a wheel of it
#     %pip install -q ../.. scikit-learn

# %%
import os

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gshard_tf
from keras_layers import MoELayer, MultiHeadAttention

IMAGE, PATCH, CLASSES = 8, 2, 10
TOKENS = (IMAGE // PATCH) ** 2
WIDTH, HIDDEN, BLOCKS, EXPERTS, BATCH = 32, 64, 2, 8, 32
EPOCHS, STEPS_PER_EPOCH = 15, 42


# %% [markdown]
# ## Images as tokens
# %%
def to_patches(images: np.ndarray) -> np.ndarray:
    """Cuts images [B, 8, 8] of values to 16 into patches [B, 16, 4] of values to 1."""
    side = IMAGE // PATCH
    patches = images.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    return (patches.reshape(-1, TOKENS, PATCH * PATCH) / 16).astype("float32")


# %% [markdown]
# ## Model
# %%
def make_model() -> keras.Model:
    """Returns a classifier of patches, compiled."""
    patches = keras.Input([TOKENS, PATCH * PATCH])
    # Each position has a bias of its own, its position embedding.
    x = keras.layers.EinsumDense(
        "blp,pm->blm",
        [TOKENS, WIDTH],
        bias_axes="lm",
        bias_initializer="random_normal",
        name="patch",
    )(patches)
    for i in range(BLOCKS):
        normalized = keras.layers.LayerNormalization()(x)
        x = x + MultiHeadAttention(num_heads=4, key_dim=8)(normalized)
        normalized = keras.layers.LayerNormalization()(x)
        # A patch goes to two experts. Where one is full, patches with the largest gates
        # have taken its places.
        router = {"kind": "top_k", "k": 2, "batch_prioritized": True}
        x = x + MoELayer(EXPERTS, HIDDEN, router=router, name=f"moe_{i}")(normalized)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(patches, keras.layers.Dense(CLASSES, name="classes")(x))
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


# %% [markdown]
# ## Training
# %%
def make_strategy() -> gshard_tf.SpmdStrategy:
    """Returns a strategy over 8 devices."""
    gshard_tf.request_cpu_devices(8)
    return gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 8}, "CPU"))


def train(
    strategy: gshard_tf.SpmdStrategy, epochs: int, steps_per_epoch: int
) -> tuple[keras.Model, dict[str, float]]:
    """Trains on three quarters of the images, and counts right answers on the others.

    Args:
        strategy: The strategy.
        epochs: Passes over the images.
        steps_per_epoch: Batches of a pass; at most 42, all that there are.

    Returns:
        The model, and `loss`, `accuracy` and the router's metrics on the images held
        out.
    """
    keras.utils.set_random_seed(0)
    digits = load_digits()
    patches, held_out, labels, held_out_labels = train_test_split(
        to_patches(digits.images), digits.target, test_size=448, random_state=0
    )
    # Whole batches: one of another shape would be another program.
    images = min(steps_per_epoch, len(patches) // BATCH) * BATCH
    with strategy.scope():
        model = make_model()
    model.fit(
        patches[:images], labels[:images], batch_size=BATCH, epochs=epochs, verbose=2
    )
    scores = model.evaluate(
        held_out, held_out_labels, batch_size=64, verbose=0, return_dict=True
    )
    print(f"\nOf {len(held_out)} images held out, {scores['accuracy']:.1%} are right.")
    return model, scores


def main(
    epochs: int = EPOCHS, steps_per_epoch: int = STEPS_PER_EPOCH
) -> dict[str, float]:
    """Trains, prints the layout around the first experts, and returns the scores."""
    strategy = make_strategy()
    model, scores = train(strategy, epochs, steps_per_epoch)
    print("\nLayout of the experts, and of what is around them:")
    for line in str(strategy.describe(model)).splitlines():
        if line.startswith(("weight", "patch", "moe_0", "classes")):
            print(line)
    return scores


# %% tags=["active-py"]
if __name__ == "__main__":
    main()

# %% tags=["active-ipynb"]
# strategy = make_strategy()
# model, scores = train(strategy, EPOCHS, STEPS_PER_EPOCH)
# strategy.describe(model)  # Each device holds an eighth of the experts.
