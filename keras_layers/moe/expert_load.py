"""Images of the experts' load over the epochs, for TensorBoard."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_layers import all_sublayers
from keras_layers.moe.layer import MoELayer


class ExpertLoadImages(keras.callbacks.Callback):
    """Writes a heat map of expert load per epoch to TensorBoard.

    One image per `MoELayer`, with a row of cells per expert and a column per epoch. The
    larger the share of the load, the darker the cell: from 0 (white) over the even
    share (middle gray) to twice that and more (black). A white row is an expert without
    tokens. Also a histogram of the shares. See "Images" and "Histograms".

    Args:
        log_dir: As of `keras.callbacks.TensorBoard`; images go to `train` in it.
        cell: Height and width of a cell in pixels.
    """

    def __init__(self, log_dir: str, cell: int = 12):
        super().__init__()
        self.log_dir = log_dir
        self.cell = cell

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._layers = [
            layer for layer in all_sublayers(self.model) if isinstance(layer, MoELayer)
        ]
        if not self._layers:
            raise ValueError(
                "ExpertLoadImages needs a model with a MoELayer. "
                f"Received: model={self.model.name!r}"
            )
        self._shares: list[list[np.ndarray]] = [[] for _ in self._layers]
        self._writer = tf.summary.create_file_writer(f"{self.log_dir}/train")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._loads: list[np.ndarray] = []

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Validation is about to reset the metrics.
        self._read_loads()

    def _read_loads(self) -> None:
        self._loads = [
            np.array(keras.ops.convert_to_numpy(layer.health.load))
            for layer in self._layers
        ]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._loads:
            self._read_loads()
        with self._writer.as_default(step=epoch):
            for i, (layer, load) in enumerate(
                zip(self._layers, self._loads, strict=True)
            ):
                share = load / max(load.sum(), 1.0) * len(load)  # 1 is even
                self._shares[i].append(share)
                tf.summary.histogram(f"{layer.path}/load", share)
                tf.summary.image(f"{layer.path}/load", self.image(i)[None])
        self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._writer.close()

    def image(self, index: int) -> np.ndarray:
        """Image of a layer, by index: `[E * cell, epochs * cell, 1]` uint8."""
        shares = np.stack(self._shares[index], axis=1)  # [E, epochs]
        gray = (255 * (1 - np.clip(shares / 2, 0, 1))).astype(np.uint8)
        return np.kron(gray, np.ones((self.cell, self.cell), np.uint8))[..., None]
