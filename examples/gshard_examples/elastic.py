"""One run on whatever machines there are: a laptop, GPUs, TPUs, one host or many.

    python -m gshard_examples.elastic RUN [--steps N]

Every process of the run starts it alike. Stopped by anything and given again, on as
many processes and devices as there are then, it trains the steps that are left, on
batches of the same rows in the same order. `docs/machines.md` has the commands for each
kind of machine.
"""

# ruff: noqa: E402
import argparse
import math
import os

# XLA and TensorFlow log pages otherwise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import gshard_tf
from gshard_examples.quickstart import EXPERTS, make_model, synthetic_text

# Of all processes together: it must not change when their number does.
BATCH = 32


def make_strategy() -> gshard_tf.SpmdStrategy:
    """Returns a strategy over all devices of all processes."""
    devices = gshard_tf.device_count()
    experts = math.gcd(devices, EXPERTS)
    mesh = gshard_tf.create_mesh({"data": devices // experts, "expert": experts})
    return gshard_tf.SpmdStrategy(mesh, process_local_batches=True)


def make_dataset() -> gshard_tf.ResumableDataset:
    """Returns endless batches, of which each process has its own rows."""
    dataset = tf.data.Dataset.from_tensor_slices(synthetic_text())
    dataset = dataset.shuffle(2048, seed=1).repeat().batch(BATCH, drop_remainder=True)
    dataset = dataset.map(gshard_tf.process_local_rows)
    dataset = dataset.map(lambda ids: (ids[:, :-1], ids[:, 1:]))
    # A count of batches fits any number of processes.
    return gshard_tf.ResumableDataset(dataset, position="count")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a folder that all processes see")
    parser.add_argument("--steps", type=int, default=200, help="in all; default: 200")
    parser.add_argument("--save-every", type=int, default=20, help="default: 20")
    options = parser.parse_args(arguments)
    group = gshard_tf.initialize()
    strategy = make_strategy()  # before TensorFlow starts: it must leave GPUs alone
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = make_model()
    dataset = make_dataset()
    saver = gshard_tf.CheckpointCallback(
        options.run, save_every=options.save_every, dataset=dataset
    )
    print(f"{group.count} processes, {strategy.mesh.size} devices", flush=True)
    model.fit(
        dataset.dataset,
        epochs=1,
        steps_per_epoch=options.steps,
        shuffle=False,  # the dataset is shuffled
        callbacks=[saver],
        verbose=2,
    )


if __name__ == "__main__":
    main()
