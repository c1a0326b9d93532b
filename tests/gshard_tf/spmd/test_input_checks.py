"""Ids and labels out of range: what plain Keras on a CPU raises, a mesh raises."""

import inspect

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

import gshard_tf
import keras_layers
from gshard_tf.spmd import index_uses as index_uses_module
from gshard_tf.spmd.index_uses import index_uses
from gshard_tf.spmd.input_checks import InputRangeError, check_indices

ROWS, CLASSES, LENGTH = 10, 5, 4
FIT = {"batch_size": 16, "shuffle": False, "verbose": 0}


def batches(examples=32):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, [examples, LENGTH]).astype("int32")
    return ids, rng.integers(0, CLASSES, [examples]).astype("int32")


def classifier(embed=None, ignore_class=None, dtype="int32"):
    """Ids -> classes; ids come as Keras casts them for `dtype`."""
    ids = keras.Input([LENGTH], dtype=dtype, name="tokens")
    table = embed or keras.layers.Embedding(ROWS, 3, name="words")
    x = keras.layers.Flatten()(table(ids))
    model = keras.Model({"tokens": ids}, keras.layers.Dense(CLASSES, name="out")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=ignore_class
    )
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


def message(make, use, mesh=None, **options):
    """What `use` of a model raises, or None; on no mesh, for None."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    if mesh is None:
        model = make()
        model.jit_compile = False  # as TensorFlow checks it
    else:
        with parity.strategy_of(mesh, **options).scope():
            model = make()
    try:
        use(model)
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return None


# A model, an id and a label that are put in place 20, and whether plain Keras raises.
CASES = {
    "good": (classifier, None, None, False),
    "id too large": (classifier, ROWS, None, True),
    "id below the last": (classifier, -ROWS - 1, None, True),
    # Keras counts from the end, as numpy does.
    "negative id": (classifier, -1, None, False),
    "ids as floats": (lambda: classifier(dtype="float32"), ROWS + 7, None, True),
    "label too large": (classifier, None, CLASSES, True),
    "negative label": (classifier, None, -1, True),
    "label ignored": (lambda: classifier(ignore_class=-1), None, -1, False),
    "label 255 ignored": (lambda: classifier(ignore_class=255), None, 255, False),
    "another label": (lambda: classifier(ignore_class=255), None, 254, True),
}


@pytest.mark.broad(3)
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_raises_what_plain_keras_raises(case):
    make, bad_id, bad_label, raises = CASES[case]
    ids, labels = batches()
    if bad_id is not None:
        ids.flat[20] = bad_id
    if bad_label is not None:
        labels[20] = bad_label

    def use(model):
        model.fit({"tokens": ids}, labels, **FIT)

    plain, meshed = message(make, use), message(make, use, 2)
    assert bool(plain) == bool(meshed) == raises
    assert meshed is None or "InputRangeError" in meshed


def test_the_message_names_layer_input_value_and_range():
    ids, labels = batches()
    ids[17, 2] = 99
    said = message(classifier, lambda m: m.fit({"tokens": ids}, labels, **FIT), 2)
    assert (
        "The look-up of 'words/embeddings' in 'functional_1/words_1' needs indices "
        "from 0 to 9. Received: 99, made of x['tokens'] (shape (16, 4), values from 0 "
        "to 99)"
    ) in said
    ids, labels = batches()
    labels[3] = 6
    said = message(classifier, lambda m: m.fit({"tokens": ids}, labels, **FIT), 2)
    assert "The cross-entropy 'compile_loss/" in said
    assert "needs indices from 0 to 4. Received: 6, made of y (shape (16,)" in said


def test_nothing_has_changed_and_the_original_is_kept():
    ids, labels = batches()
    ids[20] = ROWS
    with parity.strategy_of(2).scope():
        model = classifier()
    x = {"tokens": ids}
    model.fit({"tokens": ids[:16]}, labels[:16], **FIT)
    before = parity.state(model)
    for use in (
        lambda: model.train_on_batch({"tokens": ids[16:]}, labels[16:]),
        lambda: model.predict(x, verbose=0, batch_size=32),
        lambda: model.evaluate(x, labels, verbose=0, batch_size=32),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received: 10, made"):
            use()
        assert isinstance(model.distribute_strategy.last_error, InputRangeError)
    after = parity.state(model)
    weights = [name for name in before if int(name.split()[0]) < len(model.variables)]
    parity.assert_close(
        {n: after[n] for n in weights}, {n: before[n] for n in weights}, 0.0, "state"
    )


def test_how_many_steps_are_checked():
    """The first ones of each `fit`, all, or none."""
    good, labels = batches(64)
    bad = good.copy()
    bad[40] = ROWS  # in batch 2

    def fit(model, *sets):
        for ids in sets:
            model.fit({"tokens": ids}, labels, **FIT)

    def said(check_inputs, *sets):
        return message(
            classifier, lambda m: fit(m, *sets), 2, check_inputs=check_inputs
        )

    assert said(False, bad) is None
    assert said(2, bad) is None
    assert said(3, bad)
    assert said(True, good, bad)
    # Other data, so from the beginning: not batch 6, but batch 2.
    assert said(3, good, bad)


@pytest.mark.parametrize("wrong", [-1, 1.5, "always", None])
def test_what_is_no_number_of_steps(wrong):
    message = f"`check_inputs` must be True.*Received.*{wrong}"
    with pytest.raises(ValueError, match=message):
        parity.strategy_of(2, check_inputs=wrong)


# -- what is an index, and of what, in one traced function ---------------------------


TABLE = np.zeros([ROWS, 3], "float32")
inner = tf.function(lambda ids: tf.gather(TABLE, ids + 1))
shifted = tf.function(lambda ids: ids[:, 1:])


def in_branch(ids):
    return tf.cond(
        tf.reduce_max(ids) < ROWS, lambda: tf.gather(TABLE, ids), lambda: TABLE[None]
    )


def unused(ids):
    tf.gather(TABLE, ids)
    return ids


# A function of ids `[2, 4]`, and the ids that it takes at most; None: it is not known.
WAYS = {
    "gather": (lambda ids: tf.gather(TABLE, ids), ROWS - 1),
    "of an axis": (lambda ids: tf.gather(TABLE, ids, axis=1), 2),
    "embedding_lookup": (lambda ids: tf.nn.embedding_lookup(TABLE, ids), ROWS - 1),
    "take": (lambda ids: keras.ops.take(TABLE, ids, axis=0), ROWS - 1),
    "gather_nd": (lambda ids: tf.gather_nd(TABLE, tf.reshape(ids, [4, 2])), 2),
    "slice": (lambda ids: tf.gather(TABLE, tf.cast(ids[:, :-1], tf.int64)), ROWS - 1),
    "offset": (lambda ids: tf.gather(TABLE, ids + 3), ROWS - 4),
    "concat": (lambda ids: tf.gather(TABLE, tf.concat([ids, ids * 0], 1)), ROWS - 1),
    "split": (lambda ids: tf.gather(TABLE, tf.split(ids, 2, 1)[0]), ROWS - 1),
    "reduced": (
        lambda ids: tf.gather(TABLE, tf.reduce_max(tf.expand_dims(ids, 0), [0, 1])),
        ROWS - 1,
    ),
    "unstack": (lambda ids: tf.gather(TABLE, tf.unstack(ids, axis=1)[0]), ROWS - 1),
    "clipped": (lambda ids: tf.gather(TABLE, tf.clip_by_value(ids, 0, 9)), 10**6),
    "annotated": (lambda ids: tf.gather(TABLE, gshard_tf.replicate(ids)), ROWS - 1),
    "in a function": (inner, ROWS - 2),
    "of a function": (lambda ids: tf.gather(TABLE, shifted(ids)), ROWS - 1),
    "one_hot": (lambda ids: tf.one_hot(ids, ROWS), None),
    "of the model": (lambda ids: tf.gather(TABLE, tf.argmax(TABLE[:4])), None),
    "in a branch": (in_branch, None),
    "unused": (unused, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_known_to_be_an_index(way):
    use, largest = WAYS[way]
    mesh = gshard_tf.create_mesh({"expert": 8})
    with gshard_tf.use_mesh(mesh, gshard_tf.AxisRules.default(mesh)):
        function = tf.function(use).get_concrete_function(
            tf.TensorSpec([2, LENGTH], tf.int32)
        )
    found = index_uses(function, function.captured_inputs)
    if largest is None:
        assert not found
        return
    [use] = found
    for value in (0, largest, largest + 1):
        [indices] = [use.indices([np.full([2, LENGTH], value, "int32")])]
        out = bool(((indices < 0) | (indices >= np.array(use.sizes))).any())
        assert out == (value > largest and largest < 10**6)


def test_rows_of_one_process_stand_for_all():
    """A step is for the rows of all processes; each looks at those that it feeds."""
    function = tf.function(lambda ids: tf.gather(TABLE, tf.reshape(ids, [8]) + 1))
    function = function.get_concrete_function(tf.TensorSpec([4, 2], tf.int32))
    uses = index_uses(function, function.captured_inputs)
    mine = np.array([[0, 1], [7, 8]], "int32")
    check_indices(uses, [mine], ["ids"], copies=2)
    mine[1, 1] = 9
    with pytest.raises(InputRangeError, match=r"10, made of ids \(shape \(4, 2\)"):
        check_indices(uses, [mine], ["ids"], copies=2)


def test_what_is_computed_can_be_called():
    """TensorFlow's raw operations have the declared inputs, or the names we know."""
    for kind in index_uses_module._COMPUTED:
        accepted = inspect.signature(getattr(tf.raw_ops, kind)).parameters
        for declared in op_def_registry.get(kind).input_arg:
            name = index_uses_module._argument_name(declared.name, accepted)
            assert name in accepted, (kind, declared.name)


def test_layers_of_this_project_are_checked():
    ids, labels = batches()
    ids[5, 0] = ROWS

    def make():
        return classifier(keras_layers.TokenEmbedding(ROWS, 3, name="words"))

    said = message(make, lambda m: m.fit({"tokens": ids}, labels, **FIT), 2)
    assert "The look-up of 'words/" in said and "Received: 10, made of x" in said


def test_a_loop_of_ones_own_names_its_arguments():
    strategy = parity.strategy_of(2)
    with strategy.scope():
        table = tf.Variable(TABLE)

    @tf.function
    def step(ids, more):
        return tf.reduce_sum(tf.gather(table, more["ids"] + ids))

    ids = np.full([4], 6, "int32")
    assert float(strategy.run(step, (ids, {"ids": ids - 3}))) == 0.0
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        strategy.run(step, (ids, {"ids": ids}))
    said = (
        "Received: 12, made of argument 0 (shape (4,), values from 6 to 6), argument 1"
    )
    assert said in str(raised.value) and "argument 1['ids']" in str(raised.value)
