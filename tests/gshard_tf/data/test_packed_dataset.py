"""Packing of `tf.data` datasets, and going on in the middle."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.data import PackedDataset, plan_rows

LIMITS = {"source": 16, "target": 12}


def make_examples(count=500, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "source": draw.integers(1, 100, draw.integers(1, 13)),
            "target": draw.integers(1, 100, draw.integers(1, 9)).astype(np.int32),
        }
        for _ in range(count)
    ]


def dataset_of(examples):
    spec = {
        "source": tf.TensorSpec([None], tf.int64),
        "target": tf.TensorSpec([None], tf.int32),
    }
    return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)


def segments_of(batch, name):
    """The examples of each row, taken apart by their segment ids."""
    for ids, segments in zip(batch[name], batch[f"{name}_segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            yield ids[segments == segment].tolist()
        assert not ids[segments == 0].any()


def test_all_examples_arrive_whole():
    examples = make_examples()
    packed = PackedDataset(dataset_of(examples), LIMITS, batch_size=1, lookahead=64)
    batches = list(packed.dataset.as_numpy_iterator())
    made = []
    for batch in batches:
        sides = [list(segments_of(batch, name)) for name in LIMITS]
        made += list(zip(*sides, strict=True))
    wanted = [tuple(example[name].tolist() for name in LIMITS) for example in examples]
    assert sorted(made) == sorted(wanted)
    # The rows are the planner's, in its order.
    lengths = np.array([[len(x[name]) for name in LIMITS] for x in examples])
    plan = plan_rows(lengths, list(LIMITS.values()), 64)
    assert len(batches) == len(plan)
    assert made == [wanted[i] for i in plan.examples]
    assert packed.too_long == 0


def test_batches_have_one_shape():
    packed = PackedDataset(dataset_of(make_examples()), LIMITS, batch_size=8)
    spec = packed.dataset.element_spec
    assert {name: tuple(s.shape) for name, s in spec.items()} == {
        "source": (8, 16),
        "source_segment_ids": (8, 16),
        "target": (8, 12),
        "target_segment_ids": (8, 12),
    }
    assert spec["source"].dtype == tf.int64 and spec["target"].dtype == tf.int32
    assert spec["source_segment_ids"].dtype == tf.int32
    for batch in packed.dataset:
        assert batch["source"].shape == (8, 16)


def test_going_on():
    def resumable():
        examples = dataset_of(make_examples()).repeat()
        packed = PackedDataset(examples, LIMITS, batch_size=8, lookahead=100)
        return gshard_tf.ResumableDataset(packed.dataset, position="count")

    def take(data, count):
        return [
            {name: array.tolist() for name, array in batch.items()}
            for batch in data.dataset.take(count).as_numpy_iterator()
        ]

    wanted = take(resumable(), 70)  # more than one pass
    first, second = resumable(), resumable()
    assert take(first, 45) == wanted[:45]
    second.restore(**first.state())
    assert take(second, 25) == wanted[45:]


def test_examples_of_one_length():
    examples = tf.data.Dataset.from_tensor_slices({"a": [[1, 2], [3, 4], [5, 6]]})
    packed = PackedDataset(examples, {"a": 5}, batch_size=2)
    [batch] = packed.dataset.as_numpy_iterator()
    assert batch["a"].tolist() == [[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]
    assert batch["a_segment_ids"].tolist() == [[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]]


def test_its_iterator_is_not_one_that_tensorflow_saves():
    examples = tf.data.Dataset.from_tensors({"a": [1, 2]}).repeat()
    packed = PackedDataset(examples, {"a": 4}, batch_size=1)
    with pytest.raises(ValueError, match="position='count'"):
        gshard_tf.ResumableDataset(packed.dataset)


def test_too_long():
    examples = make_examples(20)
    for number in (3, 7):
        examples[number]["target"] = np.ones(13, np.int32)
    # One in each window.
    dropping = PackedDataset(
        dataset_of(examples), LIMITS, 1, lookahead=5, too_long="drop"
    )
    batches = list(dropping.dataset.as_numpy_iterator())
    assert dropping.too_long == 2
    assert sum(len(list(segments_of(batch, "target"))) for batch in batches) == 18
    raising = PackedDataset(dataset_of(examples), LIMITS, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="2 longer ones"):
        list(raising.dataset)


def test_an_example_without_ids():
    examples = [{"source": np.array([1]), "target": np.zeros(0, np.int32)}]
    packed = PackedDataset(dataset_of(examples), LIMITS, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="smallest 0"):
        list(packed.dataset)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"row_lengths": {"other": 8}}, "other=None"),
        ({"row_lengths": {}}, r"row_lengths=\[\]"),
        ({"row_lengths": {"source": 0}}, r"row_lengths=\[0\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lookahead": 0}, "lookahead=0"),
        ({"too_long": "cut"}, "too_long='cut'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        PackedDataset(
            **{"dataset": dataset_of([]), "row_lengths": LIMITS, "batch_size": 2}
            | options
        )


def test_datasets_of_another_kind():
    for tensors in ([[1, 2]], {"a": [[1.0]]}, {"a": [[[1]]]}):
        dataset = tf.data.Dataset.from_tensor_slices(tensors)
        with pytest.raises(ValueError, match="a vector of integers"):
            PackedDataset(dataset, {"a": 4}, 1)
