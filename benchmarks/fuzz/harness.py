"""Runs one function on a mesh and on one device, values and gradients, and compares."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import traceback
import warnings

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from gshard_tf import annotate, replicate  # noqa: F401

TOLERANCE = 1e-4


def values(seed, shape):
    """Distinct numbers in [-1.5, 1.6]: nothing ties when it is sorted or pooled."""
    size = int(np.prod(shape))
    numbers = np.linspace(-1.45, 1.55, size) if size > 1 else np.full([size], 0.7)
    numbers = np.random.default_rng(seed).permutation(numbers)
    return numbers.reshape(shape).astype("float32")


def integers(seed, shape, high):
    """Numbers in [0, high)."""
    return np.random.default_rng(seed).integers(0, high, shape).astype("int32")


def split(tensor, dimension, parts):
    """`gshard_tf.split`, on a smaller mesh into as many parts as that has devices."""
    active = gshard_tf.active_mesh()
    if active is not None:
        parts = min(parts, active.mesh.size)
    return gshard_tf.split(tensor, dimension, parts)


def set_weights(layers):
    """Gives every weight values of its own: zeros would hide much."""
    seed = 100
    for layer in layers:
        for weight in layer.weights:
            seed += 1
            if not keras.backend.is_float_dtype(weight.dtype):
                continue
            new = 0.5 * values(seed, tuple(weight.shape))
            if not weight.trainable:
                new = abs(new) + 0.5  # a moving variance, say
            weight.assign(new)


def step_of(function, layers):
    """`function`, and the gradients of a loss with respect to all that it uses."""

    def step(*inputs):
        watched = [x for x in inputs if x.dtype.is_floating]
        weights = [w.value for layer in layers for w in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            outputs = tf.nest.flatten(function(layers, *inputs))
            losses = [
                tf.reduce_sum(tf.sin(tf.cast(y, "float32")))
                for y in outputs
                if y.dtype.is_floating
            ]
            loss = tf.add_n([*losses, tf.constant(0.0)])
        gradients = tape.gradient(
            loss, [*watched, *weights], unconnected_gradients="zero"
        )
        return outputs, [tf.convert_to_tensor(g) for g in gradients]

    return step


def arrays_of(results, layers):
    """Returns the results, and the layers' state after them: two lists of arrays."""
    outputs, gradients = tf.nest.map_structure(np.asarray, results)
    state = [
        w.numpy()
        for layer in layers
        for w in layer.non_trainable_variables
        if keras.backend.is_float_dtype(w.dtype)
    ]
    return [outputs, gradients, state]


def run_plain(function, make_layers, inputs, ways=(False, True)):
    """In eager TensorFlow; compiled by TensorFlow where that has no CPU kernel."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    layers = make_layers()
    inputs = [tf.constant(x) for x in inputs]
    for compiled in ways:
        run = (
            tf.function(jit_compile=True, autograph=False) if compiled else lambda f: f
        )
        try:
            run(lambda *x: function(layers, *x))(*inputs)  # builds the layers
            set_weights(layers)
            return arrays_of(run(step_of(function, layers))(*inputs), layers)
        except (tf.errors.OpError, LookupError):
            if compiled == ways[-1]:
                raise
    return None


def run_on_mesh(function, make_layers, inputs, axes, rules, paths):
    """As one program, partitioned over a mesh."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    strategy = gshard_tf.SpmdStrategy(
        gshard_tf.create_mesh(axes), gshard_tf.AxisRules(rules, paths)
    )
    inputs = [tf.constant(x) for x in inputs]
    with strategy.scope():
        layers = make_layers()
        if layers:
            tf.function(lambda *x: function(layers, *x), autograph=False)(*inputs)
    set_weights(layers)
    step = tf.function(step_of(function, layers), autograph=False)
    try:
        return arrays_of(strategy.run(step, args=tuple(inputs)), layers)
    except Exception as error:
        raise (strategy.last_error or error) from error


def least_scale(inputs):
    """Returns the least size that an array counts as having: 1% of the inputs'.

    What is 0 because numbers of the inputs' size cancel may be their rounding.
    """
    sizes = [np.max(np.abs(x), initial=0.0) for x in inputs if x.dtype.kind == "f"]
    return max(1e-12, 1e-2 * float(max(sizes, default=0.0)))


def differences(ours, theirs, least=1e-12):
    """Largest difference of each array, relative to the largest value it should have.

    Gradients that are nothing but the rounding of larger ones are compared with those,
    and what is smaller than `least` with that.
    """
    relative = []
    for group, wanted in zip(ours, theirs, strict=True):
        largest = [float(np.max(np.abs(b), initial=0.0)) for b in wanted]
        for a, b, own in zip(group, wanted, largest, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                relative.append(float("inf"))
            elif a.dtype.kind not in "fc":
                relative.append(0.0 if np.array_equal(a, b) else float("inf"))
            elif np.array_equal(a, b, equal_nan=True):
                relative.append(0.0)
            else:
                a, b = a.astype("float64"), b.astype("float64")
                scale = max(own, 1e-2 * max(largest), least)
                worst = float(np.max(np.abs(a - b)) / scale)
                relative.append(worst if np.isfinite(worst) else float("inf"))
    return relative


def is_refusal(error):
    """Returns whether an error is one that the package itself raised."""
    frames = traceback.extract_tb(error.__traceback__)
    home = os.path.dirname(gshard_tf.__file__)
    return isinstance(error, ValueError) and any(
        frame.filename.startswith(home) for frame in frames[-1:]
    )


def is_traceable(function, make_layers, inputs):
    """Returns whether TensorFlow itself traces a function."""
    layers = make_layers()
    inputs = [tf.constant(x) for x in inputs]
    try:
        tf.function(lambda *x: function(layers, *x), autograph=False)(*inputs)
        step = tf.function(step_of(function, layers), autograph=False)
        step.get_concrete_function(*inputs)
    except Exception:
        return False
    return True


def check(function, make_layers, inputs, axes, rules, paths, want=None):
    """Compares; returns a dict whose `verdict` says what came of it.

    ok; refused: the package says that it cannot; wrong: other numbers than on one
    device; error: an exception that is no refusal; shaky: numbers that rounding alone
    changes as much; one_device: the same numbers on every mesh, but not TensorFlow's;
    unusable: TensorFlow makes no graph of it.
    """
    warnings.simplefilter("ignore")
    if want is None:
        want = run_plain(function, make_layers, inputs)
    try:
        got = run_on_mesh(function, make_layers, inputs, axes, rules, paths)
    except Exception as error:
        verdict = "refused" if is_refusal(error) else "error"
        if not is_traceable(function, make_layers, inputs):
            verdict = "unusable"
        said = f"{type(error).__name__}: {error}"
        return {"verdict": verdict, "said": said[:1000]}
    least = least_scale(inputs)
    errors = differences(got, want, least)
    if max(errors) <= TOLERANCE:
        return {"verdict": "ok"}
    try:
        one = run_on_mesh(function, make_layers, inputs, {"one": 1}, {}, paths)
    except Exception as error:
        return {"verdict": "error", "said": f"one device: {error}"[:1000]}
    noise = np.random.default_rng(9)
    shaken = [
        (x * (1 + 1e-6 * noise.choice([-1, 1], x.shape))).astype(x.dtype)
        if x.dtype.kind == "f"
        else x
        for x in inputs
    ]
    rounding = differences(run_plain(function, make_layers, shaken), want, least)
    own = differences(one, want, least)
    to_one = differences(got, one, least)
    ours = [min(pair) for pair in zip(errors, to_one, strict=True)]
    allowed = [max(TOLERANCE, 30 * r) for r in rounding]
    wrong = [i for i, e in enumerate(ours) if e > allowed[i]]
    verdict = "shaky"
    if wrong:
        verdict = "wrong"
    elif any(e > a for e, a in zip(own, allowed, strict=True)):
        verdict = "one_device"
        compiled = run_plain(function, make_layers, inputs, (True,))
        own = [
            *own,
            "; TensorFlow's own compiler:",
            *differences(compiled, want, least),
        ]
    sizes = {"outputs": len(want[0]), "gradients": len(want[1])}
    return {
        "verdict": verdict,
        "said": f"relative differences {_short(errors)} ({sizes}); on one device "
        f"{_short(own)}; by rounding {_short(rounding)}",
    }


def _short(numbers):
    return " ".join(n if isinstance(n, str) else f"{n:.1g}" for n in numbers)
