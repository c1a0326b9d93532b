"""Faults in packed rows: who shares a row, who sees whom, and what is counted."""

from benchmarks.mutants.mutant import Mutant

_BATCHES = "tests/examples/test_packed_batches.py"
_DATASET = "tests/gshard_tf/data/test_packed_dataset.py"
_ROWS = "tests/gshard_tf/data/test_rows.py"
_SEGMENTS = "tests/keras_layers/test_segment_attention.py"

MUTANTS = (
    Mutant(
        "gshard_tf/data/rows.py",
        "order = np.argsort(-size, axis=1, kind=",
        "order = np.argsort(size, axis=1, kind=",
        (f"{_ROWS}::test_the_rows_are_those_of_the_obvious_packer",),
        "the shortest example is placed first",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        "fits &= free[feature, :, :used] >= items[feature, i]",
        "fits |= free[feature, :, :used] >= items[feature, i]",
        (f"{_ROWS}::test_every_example_once_and_no_row_overfull",),
        "a row has room for an example if it has for one of its features",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        "free[feature, here, row] -= items[feature, i, :, 0]",
        "free[feature, here, row] -= items[0, i, :, 0]",
        (f"{_ROWS}::test_every_example_once_and_no_row_overfull",),
        "each feature of an example takes the room of its first",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        "rows += np.arange(windows)[:, np.newaxis] * lookahead",
        "rows += np.arange(windows)[:, np.newaxis]",
        (f"{_ROWS}::test_a_stream_is_its_windows",),
        "windows share rows",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        'examples[np.argsort(row, kind="stable")]',
        'examples[np.argsort(row, kind="stable")[::-1]]',
        (f"{_ROWS}::test_the_rows_are_those_of_the_obvious_packer",),
        "examples stand in the rows in reverse order",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        "np.repeat(plan.starts[:-1], counts) + 1",
        "np.repeat(plan.starts[:-1], counts)",
        (f"{_ROWS}::test_rows_laid_out",),
        "the first segment of a row has the id of padding",
    ),
    Mutant(
        "gshard_tf/data/rows.py",
        "offsets = row * row_length + ends[:-1] - ends_of_rows[row]",
        "offsets = row * row_length + ends[1:] - ends_of_rows[row + 1]",
        (f"{_ROWS}::test_rows_laid_out",),
        "rows are filled from their ends and overlap those before them",
    ),
    Mutant(
        "gshard_tf/data/packed_dataset.py",
        "self.too_long += plan.too_long",
        "self.too_long = plan.too_long",
        (f"{_DATASET}::test_too_long",),
        "only the last window's examples that are too long are counted",
    ),
    Mutant(
        "keras_layers/_segments.py",
        "return tf.equal(queries, keys)",
        "return tf.equal(queries > 0, keys > 0)",
        (f"{_SEGMENTS}::test_blocks",),
        "all segments see each other",
    ),
    Mutant(
        "keras_layers/_segments.py",
        "before = tf.logical_and(_earlier_of_segment(segment_ids), mask[:, None, :])",
        "before = _earlier_of_segment(segment_ids)",
        (f"{_SEGMENTS}::test_positions_and_starts",),
        "padding within a segment has positions of its own",
    ),
    Mutant(
        "keras_layers/_segments.py",
        "earlier = keras.ops.less(position[None, :], position[:, None])",
        "earlier = keras.ops.less_equal(position[None, :], position[:, None])",
        (f"{_SEGMENTS}::test_positions_and_starts",),
        "positions are counted from 1",
    ),
    Mutant(
        "keras_layers/_segments.py",
        "    return keras.ops.logical_and(same, earlier)",
        "    return keras.ops.logical_or(same, earlier) & earlier",
        (f"{_SEGMENTS}::test_positions_and_starts",),
        "positions do not restart with a segment",
    ),
    Mutant(
        "keras_layers/attention.py",
        "keys = tf.where(tf.cast(memory_mask, tf.bool), memory_segment_ids, 0)",
        "keys = memory_segment_ids",
        (f"{_SEGMENTS}::test_attention_against_an_oracle",),
        "with segments, masked keys are seen",
    ),
    Mutant(
        "keras_layers/attention.py",
        "outputs = zero_padding(outputs, sees)",
        "pass",
        (f"{_SEGMENTS}::test_attention_against_an_oracle",),
        "a query whose segment is not in the memory attends to the others",
    ),
    Mutant(
        "keras_layers/attention.py",
        "visible = past if visible is None else tf.logical_and(visible, past)",
        "visible = past if visible is None else visible",
        (f"{_SEGMENTS}::test_attention_against_an_oracle",),
        "causal attention sees the future of its segment",
    ),
    Mutant(
        "examples/gshard_examples/translation/packed_batches.py",
        "rows, tokens.target, starts + 1, lengths, target_length, PAD",
        "rows, tokens.target, starts, lengths, target_length, PAD",
        (f"{_BATCHES}::test_training_batches_hold_the_pairs_of_the_plan",),
        "the translator predicts what it has read",
    ),
    Mutant(
        "examples/gshard_examples/translation/packed_batches.py",
        "ids[dropped & ~first & (ids > EOS)] = UNK",
        "ids[dropped & (ids > EOS)] = UNK",
        (f"{_BATCHES}::test_word_dropout_hides_words_and_nothing_else",),
        "word dropout hides the tag of a language",
    ),
)
