"""How often loops turn: as TensorFlow itself counts when it runs them."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.compat.jax_hlo import hlo_as_text
from gshard_tf.hlo import parser

RULES = gshard_tf.AxisRules({"rows": "data"})


def loop(first, goes_on, after, limit=None):
    """A loop whose body communicates once, and counts its own turns."""

    def run(x):
        def body(i, turns, x):
            x = gshard_tf.annotate(tf.transpose(x), ("rows", None))
            return after(i), turns + 1, x + 1.0

        return tf.while_loop(
            lambda i, turns, x: goes_on(i, x),
            body,
            (tf.constant(first), 0, gshard_tf.annotate(x, ("rows", None))),
            maximum_iterations=limit,
        )[1:]

    return run


COUNTED = {
    "up": loop(0, lambda i, x: i < 7, lambda i: i + 1),
    "limited": loop(0, lambda i, x: i < 23, lambda i: i + 1, 30),
    "limit": loop(0, lambda i, x: i < 23, lambda i: i + 1, 10),
    "not from 0": loop(3, lambda i, x: i <= 9, lambda i: i + 1, 30),
    "in steps": loop(0, lambda i, x: i < 23, lambda i: i + 3),
    "down": loop(9, lambda i, x: 0 < i, lambda i: i - 2, 30),
    "until equal": loop(0, lambda i, x: tf.not_equal(i, 12), lambda i: i + 3),
    "doubling": loop(1, lambda i, x: i < 100, lambda i: i * 2, 50),
    "never": loop(0, lambda i, x: i < 0, lambda i: i + 1, 30),
    "int64": loop(np.int64(0), lambda i, x: i < 5, lambda i: i + 1, 9),
    "either": loop(
        0, lambda i, x: tf.logical_or(i < 4, tf.logical_not(i > 6)), lambda i: i + 1
    ),
}
UNKNOWN = {
    "by value": loop(0, lambda i, x: tf.reduce_max(x) < 5.0, lambda i: i + 1, 30),
    "by value too": loop(
        0, lambda i, x: tf.logical_and(i < 23, x[0, 0] < 5.0), lambda i: i + 1
    ),
}


def turned(run):
    """How often a loop turned, and the program that it ran as."""
    strategy = parity.strategy_of({"data": 8}, rules=RULES)
    turns, _ = strategy.run(
        tf.function(run, autograph=False), args=(tf.ones([64, 64]),)
    )
    return int(turns), strategy.programs[-1]


def moved(program):
    """How often the program runs what transposes: the loops' bodies alone do."""
    found = program.collectives()
    return {c.times for c in found if c.kind == "all-to-all"}


@pytest.mark.parametrize("name", COUNTED)
def test_a_loop_counts_as_often_as_it_turns(name):
    turns, program = turned(COUNTED[name])
    written = parser.parse(hlo_as_text(program.step.hlo))
    assert list(written.loops().values()) == [turns]
    compiled = parser.parse(program.compiled.as_text())
    # Where the compiler leaves a loop, its text says the same.
    assert set(compiled.loops().values()) <= {turns}
    assert moved(program) <= {turns} and (moved(program) or turns < 1)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loop_that_values_end_is_unknown(name):
    _, program = turned(UNKNOWN[name])
    assert moved(program) == {None}
    compiled = parser.parse(program.compiled.as_text())
    assert list(compiled.loops().values()) == [None]
    assert len(compiled.unknown_loops()) == 1


def test_loops_in_loops_multiply():
    inner = COUNTED["down"]

    def run(x):
        return tf.while_loop(
            lambda i, turns, x: i < 3,
            lambda i, turns, x: (i + 1, *(turns + inner(x)[0], inner(x)[1])),
            (0, 0, x),
            maximum_iterations=8,
        )[1:]

    turns, program = turned(run)
    assert turns == 3 * 5 and moved(program) == {turns}


def test_recurrent_layers_and_their_gradients():
    def make():
        model = keras.Sequential([keras.layers.Input([12, 8]), keras.layers.LSTM(16)])
        model.compile("sgd", "mse")
        return model

    x, y = np.ones([8, 12, 8], "float32"), np.ones([8, 16], "float32")
    run = parity.run_on_mesh(
        make, lambda model: model.fit(x, y, batch_size=8, verbose=0), {"data": 8}
    )
    (program,) = run.strategy.programs
    compiled = parser.parse(program.compiled.as_text())
    assert list(compiled.loops().values()) == [12, 12]


TEXT = """HloModule m

cond {
  p.1 = (s64[], f32[4,4]{1,0}) parameter(0)
  i.1 = s64[] get-tuple-element(p.1), index=0
  n.1 = s64[] constant(5)
  ROOT less.1 = pred[] compare(i.1, n.1), direction=LT
}

body {
  p.2 = (s64[], f32[4,4]{1,0}) parameter(0)
  x.2 = f32[4,4]{1,0} get-tuple-element(p.2), index=1
  y.2 = f32[4,4]{1,0} dot(x.2, x.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  i.2 = s64[] get-tuple-element(p.2), index=0
  one.2 = s64[] constant(1)
  j.2 = s64[] add(i.2, one.2)
  ROOT t.2 = (s64[], f32[4,4]{1,0}) tuple(j.2, y.2)
}

ENTRY main {
  x.3 = f32[4,4]{1,0} parameter(0)
  i.3 = s64[] constant(0)
  t.3 = (s64[], f32[4,4]{1,0}) tuple(i.3, x.3)
  ROOT w.3 = (s64[], f32[4,4]{1,0}) while(t.3), condition=cond, body=body, metadata={op_name="a/while"}
}
"""  # noqa: E501


def test_what_a_compiler_hides_is_known_from_before():
    before = parser.parse(TEXT)
    assert before.loops() == {"a/while": 5}
    # The TPU compiler makes two numbers of one of 64 bits.
    hidden = TEXT.replace("add(i.2, one.2)", 'custom-call(i.2), target="X64Combine"')

    def times(name, loops):
        module = parser.parse(hidden.replace("a/while", name))
        return [n for i, _, n in module.executed(loops) if i.opcode == "dot"]

    assert times("jit(step)/a/while", before.loops()) == [5]
    assert times("jit(step)/a/while", {}) == [None]
    # A longer name is of another loop, of which nothing is known.
    both = {"a/while": 5, "b/a/while": None}
    assert times("jit(step)/b/a/while", both) == [None]


def test_loops_of_one_name_that_differ_are_unknown():
    again = TEXT.replace("ROOT w.3", "w.3").replace(
        'a/while"}\n}',
        'a/while"}\n  i.4 = s64[] constant(2)\n'
        "  t.4 = (s64[], f32[4,4]{1,0}) tuple(i.4, x.3)\n"
        "  ROOT w.4 = (s64[], f32[4,4]{1,0}) while(t.4), condition=cond, body=body, "
        'metadata={op_name="a/while"}\n}',
    )
    module = parser.parse(again)
    times = [n for i, _, n in module.executed() if i.opcode == "dot"]
    assert times == [5, 3]
    assert module.loops() == {"a/while": None}
