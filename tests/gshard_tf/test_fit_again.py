"""More than one `fit`, and more than one model, as in plain Keras."""

import gc
import weakref

import keras
import parity
from parity import assert_equal_runs

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_compile_again_and_fit_again():
    def use(model):
        first = fit(model).history
        scope = model.distribute_strategy.scope
        with scope():
            model.compile(
                keras.optimizers.SGD(0.1), sparse_loss(), metrics=["accuracy"]
            )
        if model.jit_compile:
            model.jit_compile = False
        second = fit(model).history
        model.layers[0].trainable = False
        with scope():
            model.compile("adam", sparse_loss())
        if model.jit_compile:
            model.jit_compile = False
        third = fit(model).history
        return first, second, third

    assert_equal_runs(parity.compiled, use)


def test_two_models_in_one_strategy_that_share_a_layer():
    class Two:
        """What `parity` compares; the second model trains the first one's experts."""

        def __init__(self):
            self.first = parity.compiled()
            shared = self.first.layers[0]
            self.second = keras.Sequential(
                [shared, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
            )
            self.second.compile("sgd", "mse")

        jit_compile = False
        variables = property(lambda s: s.first.variables + s.second.variables)
        metrics_variables = property(lambda s: s.first.metrics_variables)
        optimizer = property(lambda s: s.first.optimizer)

    def use(two):
        if not two.first.distribute_strategy.extended.__class__.__name__ == (
            "SpmdExtended"
        ):
            two.first.jit_compile = two.second.jit_compile = False
        found = []
        for _ in range(2):
            found.append(fit(two.first).history)
            found.append(two.second.fit(X, Y.astype("float32"), **FIT).history)
        return found

    assert_equal_runs(Two, use)


def test_fit_inside_the_scope():
    def use(model):
        with model.distribute_strategy.scope():
            return fit(model).history

    assert_equal_runs(parity.compiled, use)


def test_programs_and_models_are_freed():
    def use(model):
        fit(model)
        model.evaluate(X, Y, batch_size=16, verbose=0)
        model.predict(X, batch_size=16, verbose=0)

    run = parity.run_on_mesh(parity.compiled, use)
    model, strategy = weakref.ref(run.model), run.strategy
    assert len(strategy.programs) == 3
    del run
    keras.backend.clear_session()
    gc.collect()
    assert model() is None and strategy.programs == []
