"""A picture of the experts' load over time, in TensorBoard."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_layers.moe.layer import MoELayer


class LoadPicture(keras.callbacks.Callback):
    """Writes, after each epoch, what each expert was asked for in each epoch so far.

    One image per `MoELayer`: a row of cells per expert, a column per epoch; the darker,
    the larger the share of the load, from 0 (white) over the even share (middle grey)
    to twice that and more (black). Rows that are white mean experts that nothing goes
    to. Also a histogram of the shares. Look under "Images" and "Histograms".

    Args:
        log_dir: As of `keras.callbacks.TensorBoard`; the picture goes to `train` in it.
        cell: Height and width of a cell in pixels.
    """

    def __init__(self, log_dir: str, cell: int = 12):
        super().__init__()
        self.log_dir = log_dir
        self.cell = cell

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._layers = [
            # Private to Keras: `layers` of a subclassed model has only the outermost.
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, MoELayer)
        ]
        if not self._layers:
            raise ValueError(
                "LoadPicture draws the experts' load, and the model has no MoELayer. "
                f"Received: model={self.model.name!r}"
            )
        self._shares = [[] for _ in self._layers]
        self._writer = tf.summary.create_file_writer(f"{self.log_dir}/train")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._loads = None

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Validation is about to start the metrics anew.
        self._look()

    def _look(self) -> None:
        self._loads = [
            np.array(keras.ops.convert_to_numpy(layer.health.load))
            for layer in self._layers
        ]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._loads is None:
            self._look()
        with self._writer.as_default(step=epoch):
            for i, (layer, load) in enumerate(
                zip(self._layers, self._loads, strict=True)
            ):
                share = load / max(load.sum(), 1.0) * len(load)  # 1 is even
                self._shares[i].append(share)
                tf.summary.histogram(f"{layer.path}/load", share)
                tf.summary.image(f"{layer.path}/load", self.picture(i)[None])
        self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._writer.close()

    def picture(self, number: int) -> np.ndarray:
        """The picture of a layer, by number: `[E * cell, epochs * cell, 1]` uint8."""
        shares = np.stack(self._shares[number], axis=1)  # [E, epochs]
        grey = (255 * (1 - np.clip(shares / 2, 0, 1))).astype(np.uint8)
        return np.kron(grey, np.ones((self.cell, self.cell), np.uint8))[..., None]
