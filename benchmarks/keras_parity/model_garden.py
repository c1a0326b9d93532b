"""Cases of the TF Model Garden: its networks, optimizers and training loops."""

import tempfile
from types import ModuleType
from typing import Any

import numpy as np
import orbit
import tensorflow as tf
import tf_keras
from official.core import base_task, base_trainer, config_definitions, train_lib
from official.modeling import optimization
from official.nlp import modeling
from official.nlp.modeling import layers
from official.vision.modeling import backbones, classification_model

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

IMAGES = np.random.default_rng(3).normal(size=[8, 32, 32, 3]).astype("float32")
# A rate that rises for two steps of warmup, and falls.
RATE = {
    "learning_rate": {
        "type": "polynomial",
        "polynomial": {"initial_learning_rate": 1e-3, "decay_steps": 8},
    },
    "warmup": {"type": "linear", "linear": {"warmup_steps": 2}},
}


def _optimizer(kind: str, average: bool = False, **settings: Any) -> Any:
    config = {"optimizer": {"type": kind, kind: settings}, **RATE}
    if average:
        config["ema"] = {"average_decay": 0.9}
    factory = optimization.OptimizerFactory(optimization.OptimizationConfig(config))
    return factory.build_optimizer(factory.build_learning_rate())


def _with(kind: str, **settings: Any) -> Any:
    return lambda K: classifier(K, _optimizer(kind, **settings))


def _averaged(K: ModuleType) -> Any:
    optimizer = _optimizer("sgd", average=True, momentum=0.9)
    model = classifier(K, optimizer)
    optimizer.shadow_copy(model)
    return model


def _fit_and_swap(K: ModuleType, model: Any) -> Any:
    history = fit(K, model)
    with model.distribute_strategy.scope():
        model.optimizer.swap_weights()
    swapped = model.get_weights()
    with model.distribute_strategy.scope():
        model.optimizer.swap_weights()
    return [history, swapped]


def _bert(K: ModuleType, one_hot: bool = False, **settings: Any) -> Any:
    embedding = layers.OnDeviceEmbedding(
        vocab_size=16, embedding_width=32, use_one_hot=one_hot, name="word_embeddings"
    )
    encoder = modeling.networks.BertEncoderV2(
        vocab_size=16,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=4,
        inner_dim=64,
        output_dropout=0.0,
        attention_dropout=0.0,
        max_sequence_length=8,
        embedding_layer=embedding,
    )
    model = modeling.models.BertClassifier(encoder, 3, dropout_rate=0.0)
    decay = {"weight_decay_rate": 0.01, "exclude_from_weight_decay": ["bias"]}
    model.compile(_optimizer("adamw", **decay, **settings), cross_entropy(K))
    return model


def _fit_bert(K: ModuleType, model: Any) -> Any:
    inputs = {
        "input_word_ids": IDS,
        "input_mask": np.ones_like(IDS),
        "input_type_ids": np.zeros_like(IDS),
    }
    return model.fit(inputs, Y, **FIT).history


def _resnet(K: ModuleType) -> Any:
    specs = K.layers.InputSpec(shape=[None, 32, 32, 3])
    model = classification_model.ClassificationModel(
        backbones.ResNet(18, input_specs=specs, stem_type="v0"),
        3,
        input_specs=specs,
        kernel_regularizer=K.regularizers.l2(1e-4),
    )
    optimizer = _optimizer("sgd", momentum=0.9)
    model.compile(optimizer, cross_entropy(K), metrics=["accuracy"])
    return model


def _fit_images(K: ModuleType, model: Any) -> Any:
    return model.fit(IMAGES, Y[:8], batch_size=4, shuffle=False, verbose=0).history


class _Digits(base_task.Task):
    """A task of the Model Garden: a model, its data, losses and metrics."""

    def build_model(self) -> Any:
        return classifier(tf_keras)

    def build_inputs(self, params: Any, input_context: Any = None) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).repeat()
        return dataset.batch(8, drop_remainder=True)

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> tf.Tensor:
        loss_of = tf_keras.losses.sparse_categorical_crossentropy
        return tf.reduce_mean(loss_of(labels, model_outputs, from_logits=True))

    def build_metrics(self, training: bool = True) -> list[Any]:
        return [tf_keras.metrics.SparseCategoricalAccuracy("accuracy")]


def _config(optimizer: dict[str, Any]) -> config_definitions.ExperimentConfig:
    return config_definitions.ExperimentConfig(
        task=config_definitions.TaskConfig(),
        trainer=config_definitions.TrainerConfig(
            train_steps=6,
            validation_steps=2,
            validation_interval=3,
            steps_per_loop=3,
            summary_interval=3,
            checkpoint_interval=3,
            optimizer_config={**optimizer, **RATE},
        ),
    )


def _numbers(logs: Any) -> dict[str, float]:
    return {k: float(v) for k, v in (logs or {}).items() if k != "steps_per_second"}


def _train_by_orbit(K: ModuleType, model: Any) -> Any:
    config = _config({"optimizer": {"type": "adamw"}})
    task = _Digits(config.task)
    with model.distribute_strategy.scope():
        optimizer = task.create_optimizer(config.trainer.optimizer_config)
        trainer = base_trainer.Trainer(config, task, model, optimizer, True, True)
    with tempfile.TemporaryDirectory() as folder:
        manager = tf.train.CheckpointManager(
            trainer.checkpoint,
            folder,
            max_to_keep=2,
            step_counter=trainer.global_step,
            checkpoint_interval=3,
        )
        controller = orbit.Controller(
            strategy=trainer.strategy,
            trainer=trainer,
            evaluator=trainer,
            global_step=trainer.global_step,
            steps_per_loop=3,
            checkpoint_manager=manager,
            summary_dir=folder,
            summary_interval=3,
        )
        logs = _numbers(controller.train_and_evaluate(6, 2, 3))
        results = [logs, [v.numpy() for v in slots(trainer.optimizer)]]
        # Back to the third step, and on from there.
        trainer.checkpoint.restore(manager.checkpoints[0]).assert_consumed()
        controller.train(6)
        return [*results, [v.numpy() for v in slots(trainer.optimizer)]]


def _experiment(K: ModuleType, model: Any) -> Any:
    fit(K, model)
    config = _config({"optimizer": {"type": "sgd"}, "ema": {"average_decay": 0.9}})
    K.utils.set_random_seed(3)
    with tempfile.TemporaryDirectory() as folder:
        trained, logs = train_lib.run_experiment(
            distribution_strategy=model.distribute_strategy,
            task=_Digits(config.task),
            mode="train_and_eval",
            params=config,
            model_dir=folder,
        )
    return [_numbers(logs), trained.get_weights()]


CASES = {
    "bert": Case(
        "a BERT encoder, AdamW with warmup and decay",
        # Without clipping: plain TensorFlow takes the norm of a table's gradient over
        # its look-ups, each by itself, and not over their sums.
        lambda K: _bert(K, gradient_clip_norm=0.0),
        _fit_bert,
    ),
    "bert_clipped": Case(
        "the same, gradients clipped by their norm, look-ups by a product",
        lambda K: _bert(K, one_hot=True),
        _fit_bert,
    ),
    "resnet": Case(
        "a ResNet-18, momentum with warmup and decay",
        _resnet,
        _fit_images,
        # Its last layers normalize over four numbers, which magnifies rounding; the
        # difference is another one in each run.
        tolerance=5e-4,
    ),
    "lamb": Case("LAMB", _with("lamb"), fit),
    "lars": Case("LARS", _with("lars"), fit),
    "averages": Case(
        "`ExponentialMovingAverage`, weights swapped",
        _averaged,
        _fit_and_swap,
        one_device=True,
    ),
    "orbit": Case(
        "`orbit.Controller` with the Model Garden's `Trainer`, its checkpoints",
        classifier,
        _train_by_orbit,
        one_device=True,
    ),
    "experiment": Case(
        "`train_lib.run_experiment`, with moving averages",
        classifier,
        _experiment,
        one_device=True,
    ),
}
