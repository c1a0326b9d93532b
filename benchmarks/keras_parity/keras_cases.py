"""Cases that Keras 3 and Keras 2 (`tf_keras`) share, word for word."""

import os
import tempfile
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.keras_parity.case import (
    FIT,
    IDS,
    Case,
    X,
    Y,
    classifier,
    cross_entropy,
    fit,
    slots,
)

WEIGHTS = np.linspace(0.1, 2.0, 32).astype("float32")


def _methods(K: ModuleType, model: Any) -> Any:
    return [
        # The last batch is short.
        model.fit(X[:29], Y[:29], validation_data=(X[:13], Y[:13]), **FIT).history,
        model.evaluate(X[:29], Y[:29], batch_size=8, verbose=0),
        model.predict(X[:13], batch_size=8, verbose=0),
    ]


def _weighted(K: ModuleType, model: Any) -> Any:
    return [
        model.fit(X, Y, sample_weight=WEIGHTS, **FIT).history,
        model.fit(X, Y, class_weight={0: 1.0, 1: 0.5, 2: 3.0}, **FIT).history,
        model.fit(X, Y, validation_split=0.5, **FIT).history,
        model.train_on_batch(X[:8], Y[:8], sample_weight=WEIGHTS[:8]),
        model.test_on_batch(X[:8], Y[:8]),
        model.predict_on_batch(X[:8]),
    ]


def _two_outputs(K: ModuleType) -> Any:
    a, b = K.Input([8, 4], name="a"), K.Input([4], name="b")
    x = K.layers.Concatenate()([K.layers.Flatten()(a), b])
    x = K.layers.Dense(16, "relu", name="hidden")(x)
    outputs = {"c": K.layers.Dense(3, name="c")(x), "v": K.layers.Dense(1, name="v")(x)}
    model = K.Model({"a": a, "b": b}, outputs)
    model.compile(
        K.optimizers.Adam(1e-2),
        {"c": cross_entropy(K), "v": "mse"},
        metrics={"c": ["accuracy"], "v": ["mae"]},
        loss_weights={"c": 1.0, "v": 0.5},
    )
    return model


def _fit_two_outputs(K: ModuleType, model: Any) -> Any:
    x, y = {"a": X, "b": X[:, 0]}, {"c": Y, "v": X[:, 0, :1]}
    history = model.fit(x, y, validation_data=(x, y), **FIT).history
    return [history, model.predict(x, batch_size=8, verbose=0)]


def _images(K: ModuleType) -> Any:
    model = K.Sequential(
        [
            K.Input([8, 4, 1]),
            # Before a normalization, the gradient of a bias is that of rounding.
            K.layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv"),
            K.layers.BatchNormalization(),
            K.layers.ReLU(),
            K.layers.MaxPooling2D(),
            K.layers.DepthwiseConv2D(2),
            K.layers.GlobalAveragePooling2D(),
            K.layers.Dense(3),
        ]
    )
    model.compile(K.optimizers.SGD(0.1, momentum=0.9), cross_entropy(K))
    return model


def _recurrent(K: ModuleType) -> Any:
    model = K.Sequential(
        [
            K.Input([4], dtype="int32"),
            K.layers.Embedding(16, 8, mask_zero=True),
            K.layers.LSTM(6, return_sequences=True),
            K.layers.GRU(4),
            K.layers.Dense(3),
        ]
    )
    # Plain Keras 3's Adam squares each look-up of a row by itself.
    optimizer = K.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, cross_entropy(K), weighted_metrics=["accuracy"])
    return model


def _fit_masked(K: ModuleType, model: Any) -> Any:
    ids = np.where(np.arange(4) > 2, 0, IDS[:, :4])
    return model.fit(ids, Y, **FIT).history


def _attention(K: ModuleType) -> Any:
    inputs = K.Input([8, 4])
    x = inputs + K.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = K.layers.GlobalAveragePooling1D()(K.layers.LayerNormalization()(x))
    model = K.Model(inputs, K.layers.Dense(3)(x))
    model.compile(K.optimizers.Adam(1e-2), cross_entropy(K))
    return model


def _metrics(K: ModuleType) -> Any:
    inputs = K.Input([8, 4])
    x = K.layers.Dense(16, "tanh", name="hidden")(K.layers.Flatten()(inputs))
    model = K.Model(inputs, K.layers.Dense(1, "sigmoid")(x))
    metrics = [
        K.metrics.AUC(),
        K.metrics.Precision(),
        K.metrics.Recall(),
        K.metrics.F1Score(threshold=0.5),
        "mae",
    ]
    model.compile(K.optimizers.Adam(1e-2), "binary_crossentropy", metrics=metrics)
    return model


def _fit_binary(K: ModuleType, model: Any) -> Any:
    y = (Y > 0).astype("float32")[:, None]
    history = model.fit(X, y, **FIT).history
    return [history, model.evaluate(X, y, batch_size=8, verbose=0)]


def _with_state(K: ModuleType) -> Any:
    class Watched(K.layers.Layer):
        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(
                name="scale",
                shape=[shape[-1]],
                initializer="ones",
                regularizer=K.regularizers.L2(0.01),
            )
            self.calls = self.add_weight(
                name="calls", shape=[], initializer="zeros", trainable=False
            )

        def call(self, x: Any, training: bool = False) -> Any:
            y = x * self.scale
            self.add_loss(0.1 * tf.reduce_mean(y**2))
            if training:
                self.calls.assign_add(1.0)
            return y

    layers = [
        K.Input([8, 4]),
        Watched(),
        K.layers.Flatten(),
        K.layers.Dense(16, name="hidden", kernel_regularizer=K.regularizers.L2(0.01)),
        K.layers.Dense(3),
    ]
    model = K.Sequential(layers)
    model.compile(K.optimizers.Adam(1e-2), cross_entropy(K))
    return model


def _own_step(K: ModuleType) -> Any:
    class OwnStep(K.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = K.layers.Dense(16, "tanh", name="hidden")
            self.head = K.layers.Dense(3)
            self.second = K.optimizers.SGD(0.05, momentum=0.9)
            self.mean = K.metrics.Mean("mean")

        def call(self, x: Any) -> Any:
            return self.head(self.hidden(tf.reshape(x, [-1, 32])))

        def train_step(self, data: Any) -> Any:
            x, y = data
            # Keras 2 wants to know how losses are summed over replicas.
            loss_of = cross_entropy(K, reduction="none")
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(loss_of(y, self(x)))
            first, rest = self.hidden.trainable_weights, self.head.trainable_weights
            gradients = tape.gradient(loss, first + rest)
            self.optimizer.apply_gradients(zip(gradients[:2], first, strict=True))
            self.second.apply_gradients(zip(gradients[2:], rest, strict=True))
            self.mean.update_state(loss)
            return {"loss": loss, "mean": self.mean.result()}

        @property
        def metrics(self) -> list[Any]:
            return [self.mean]

    model = OwnStep()
    model(tf.zeros([1, 32]))
    model.compile(K.optimizers.Adam(1e-2))
    # Under any strategy Keras 3 would give it slots for all weights.
    model.optimizer.build(model.hidden.trainable_weights)
    return model


def _fit_two_optimizers(K: ModuleType, model: Any) -> Any:
    history = fit(K, model)
    return [history, [np.array(v.numpy()) for v in slots(model.second)]]


def _scheduled(K: ModuleType) -> Any:
    rate = K.optimizers.schedules.CosineDecay(1e-2, 6)
    optimizer = K.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=0.5)
    return classifier(K, optimizer)


def _averaged(K: ModuleType) -> Any:
    return classifier(
        K, K.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, clipvalue=0.1)
    )


def _of_policy(policy: str) -> Any:
    def make(K: ModuleType) -> Any:
        mixed = K.mixed_precision
        set_policy = getattr(mixed, "set_global_policy", None) or mixed.set_dtype_policy
        set_policy(policy)
        try:
            return classifier(K)
        finally:
            set_policy("float32")

    return make


def _callbacks(K: ModuleType, model: Any) -> Any:
    read: list[float] = []

    class Reads(K.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            read.append(float(np.sum(np.abs(self.model.get_weights()[0]))))

    with tempfile.TemporaryDirectory() as folder:
        history = model.fit(
            X,
            Y,
            validation_data=(X, Y),
            callbacks=[
                Reads(),
                K.callbacks.ModelCheckpoint(folder + "/{epoch}.keras"),
                K.callbacks.ModelCheckpoint(
                    folder + "/{epoch}.weights.h5", save_weights_only=True
                ),
                K.callbacks.EarlyStopping(
                    "val_loss", patience=1, restore_best_weights=True
                ),
                K.callbacks.ReduceLROnPlateau("val_loss", patience=0, min_delta=10.0),
                K.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
                K.callbacks.TensorBoard(folder + "/board", histogram_freq=1),
                K.callbacks.CSVLogger(folder + "/log.csv"),
                K.callbacks.TerminateOnNaN(),
            ],
            **FIT,
        ).history
        return [history, read, sorted(os.listdir(folder))]


def _kinds(K: ModuleType) -> list[str]:
    return ["m.keras"] if K.__name__ == "keras" else ["m.keras", "m.h5", "folder"]


def _load(K: ModuleType, model: Any) -> Any:
    results: list[Any] = [fit(K, model)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, kind) for kind in _kinds(K)]
        # Outside of the scope: of one device.
        K.utils.set_random_seed(1)
        plain = classifier(K)
        fit(K, plain)
        for path in paths:
            plain.save(path)
        for path in paths:
            with model.distribute_strategy.scope():
                loaded = K.models.load_model(path)
            results += [fit(K, loaded), loaded.get_weights()]
            results += [[np.array(v.numpy()) for v in slots(loaded.optimizer)]]
    return results


def _saved(K: ModuleType, model: Any) -> Any:
    results = [fit(K, model)]
    with tempfile.TemporaryDirectory() as folder:
        for kind in _kinds(K):
            path = os.path.join(folder, kind)
            model.save(path)
            other = K.models.load_model(path)
            results += [[np.array(v.numpy()) for v in slots(other.optimizer)]]
            results += [other.predict(X, verbose=0), other.fit(X, Y, **FIT).history]
        weights = os.path.join(folder, "m.weights.h5")
        model.save_weights(weights)
        before = model.get_weights()
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = checkpoint.save(os.path.join(folder, "checkpoint"))
        fit(K, model)
        model.load_weights(weights)
        results.append(_moved(model, before))
        fit(K, model)
        checkpoint.restore(path).assert_consumed()
        results.append(_moved(model, before))
        # With the slots that the checkpoint had.
        results.append(fit(K, model))
    return results


def _moved(model: Any, others: list[np.ndarray]) -> float:
    pairs = zip(model.get_weights(), others, strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def _own_loop(K: ModuleType, model: Any) -> Any:
    strategy = model.distribute_strategy
    loss_of = cross_entropy(K, reduction="none")
    with strategy.scope():
        accuracy = K.metrics.SparseCategoricalAccuracy()
        # Else its slots are named after the loop in which it is built.
        model.optimizer.build(model.trainable_variables)

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = tf.reduce_mean(loss_of(y, logits))
        weights = model.trainable_variables
        gradients = tape.gradient(loss, weights)
        model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        accuracy.update_state(y, logits)
        return loss

    @tf.function
    def steps(batches: Any) -> tf.Tensor:
        total = tf.constant(0.0)
        for _ in tf.range(4):
            loss = strategy.run(step, args=next(batches))
            total += strategy.reduce("SUM", loss, axis=None)
        return total

    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).repeat()
    batches = iter(strategy.experimental_distribute_dataset(dataset))
    results = []
    for _ in range(2):
        results += [float(steps(batches)), float(accuracy.result())]
        accuracy.reset_state()
    return results


CASES = {
    "methods": Case(
        "`fit`, `evaluate`, `predict`, short batches", classifier, _methods
    ),
    "weighted": Case(
        "`sample_weight`, `class_weight`, `validation_split`, `*_on_batch`",
        lambda K: classifier(K, weighted_metrics=["accuracy"]),
        _weighted,
    ),
    "outputs": Case("several inputs and outputs", _two_outputs, _fit_two_outputs),
    "images": Case(
        "convolutions, `BatchNormalization`, pooling",
        _images,
        lambda K, model: model.fit(X[..., None], Y, **FIT).history,
    ),
    "recurrent": Case(
        "`Embedding` with a mask, `LSTM`, `GRU`", _recurrent, _fit_masked
    ),
    "attention": Case("`MultiHeadAttention`, `LayerNormalization`", _attention, fit),
    "metrics": Case("`AUC`, `Precision`, `Recall`, `F1Score`", _metrics, _fit_binary),
    "state": Case("`add_loss`, regularizers, state in layers", _with_state, fit),
    "own_step": Case(
        "a `train_step` of one's own, two optimizers", _own_step, _fit_two_optimizers
    ),
    "schedule": Case("schedules, clipping, weight decay", _scheduled, fit),
    "ema": Case("moving averages of weights", _averaged, fit),
    "steps_per_execution": Case(
        "`steps_per_execution`", lambda K: classifier(K, steps_per_execution=3), fit
    ),
    "callbacks": Case("callbacks", classifier, _callbacks),
    "saved": Case("saving on the mesh, checkpoints", classifier, _saved),
    "loaded": Case("models of one device, loaded on the mesh", classifier, _load),
    "bfloat16": Case("`mixed_bfloat16`", _of_policy("mixed_bfloat16"), fit, 0.2),
    "float16": Case(
        "`mixed_float16`, with loss scaling", _of_policy("mixed_float16"), fit, 0.05
    ),
    "own_loop": Case("`strategy.run` in a loop of one's own", classifier, _own_loop),
}
