"""Faults in losses and metrics of tokens, and in the projection in blocks."""

from benchmarks.mutants.mutant import Mutant

_LABELS = "tests/keras_layers/losses/test_transformer_labels.py"
_LOSSES = "tests/keras_layers/losses/test_token_losses.py"
_PROJECTED = "tests/keras_layers/losses/test_projected.py"

MUTANTS = (
    Mutant(
        "keras_layers/losses/statistics.py",
        "earlier = tf.range(size) < labels[..., None]",
        "earlier = tf.range(size) > labels[..., None]",
        (f"{_LOSSES}::test_the_first_of_equal_logits_is_the_prediction",),
        "of equal logits the last is the prediction",
    ),
    Mutant(
        "keras_layers/losses/statistics.py",
        "known = (labels >= 0) & (labels < size)",
        "known = labels < size",
        (f"{_LOSSES}::test_a_label_without_a_logit_is_not_a_number",),
        "a negative label is a label",
    ),
    Mutant(
        "keras_layers/losses/statistics.py",
        "shift = tf.where(tf.math.is_finite(maximum), maximum, 0.0)",
        "shift = tf.zeros_like(maximum)",
        (f"{_LOSSES}::test_logits_of_any_size",),
        "exponentials of large logits overflow",
    ),
    Mutant(
        "keras_layers/losses/statistics.py",
        "mean_logit = tf.reduce_sum(logits, axis=-1) / size",
        "mean_logit = tf.reduce_sum(logits, axis=-1) / (size - 1)",
        (f"{_LOSSES}::test_smoothing_of_keras",),
        "smoothing spreads over all classes but one",
    ),
    Mutant(
        "keras_layers/losses/statistics.py",
        "return tf.where(chosen, d_picked[..., None], 0.0), None",
        "return tf.where(chosen, 0.0, d_picked[..., None]), None",
        (f"{_LOSSES}::test_keras_own_loss",),
        "the gradient of a label's logit goes to all others",
    ),
    Mutant(
        "keras_layers/losses/crossentropy.py",
        "self.label_smoothing * (statistics.mean_logit - target)",
        "self.label_smoothing * statistics.mean_logit",
        (f"{_LOSSES}::test_values_and_gradients_of_the_formulas",),
        "smoothing takes nothing from the label",
    ),
    Mutant(
        "keras_layers/losses/crossentropy.py",
        "losses += self.z_loss * tf.square(statistics.log_sum_exp)",
        "losses += self.z_loss * tf.abs(statistics.log_sum_exp)",
        (f"{_LOSSES}::test_values_and_gradients_of_the_formulas",),
        "the z-loss is not squared",
    ),
    Mutant(
        "keras_layers/losses/crossentropy.py",
        "        set_keras_mask(losses, valid)\n",
        "",
        (f"{_LOSSES}::test_keras_own_loss",),
        "labels that are left out count in the mean",
    ),
    Mutant(
        "keras_layers/losses/metrics.py",
        "mask = valid if mask is None else mask & valid",
        "mask = valid",
        (f"{_LOSSES}::test_metrics_with_a_class_to_ignore",),
        "a metric with a class to ignore forgets the mask",
    ),
    Mutant(
        "keras_layers/losses/projected.py",
        "tf.cast(d_logits + d_mean / size, table.dtype)",
        "tf.cast(d_logits, table.dtype)",
        (f"{_PROJECTED}::test_values_and_gradients_of_whole_logits",),
        "in blocks, the mean logit has no gradient",
    ),
    Mutant(
        "keras_layers/losses/projected.py",
        "annotate(d_table + tf.cast(d_part, tf.float32), axes)",
        "annotate(tf.cast(d_part, tf.float32), axes)",
        (f"{_PROJECTED}::test_values_and_gradients_of_whole_logits",),
        "the table's gradient is that of the first block alone",
    ),
    Mutant(
        "keras_layers/losses/projected.py",
        "return parts if batch % parts == 0 else 1",
        "return 1",
        (f"{_PROJECTED}::test_on_a_mesh_no_logits_and_no_table_move",),
        "each block's gradient of the table is summed over devices",
    ),
    Mutant(
        "keras_layers/embedding.py",
        "        if block_length is None:\n            return pack(token",
        "        if block_length is not None:\n            return pack(token",
        (f"{_LABELS}::test_on_a_mesh_logits_never_exist_whole",),
        "a Transformer's logits exist whole where blocks are asked for",
    ),
)
