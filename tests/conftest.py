"""One process, eight virtual CPU devices, for every test that runs a mesh.

What needs another state of the process (jax already started, DTensor's device) runs
in a process of its own: see `processes.py`.
"""

import gc
import itertools
import os

from xla_flags import QUICK_TO_COMPILE, use_older_emitter

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Nothing here runs on a TPU, and libtpu complains loudly where it finds none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)

import hypothesis
import jax
import keras
import pytest
import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops
from tensorflow.python.framework import ops
from tensorflow.python.util import tf_stack

import gshard_tf

use_older_emitter()
gshard_tf.request_cpu_devices(8)
# jax starts here, so that no test in this process can ask for another number.
jax.devices()

# Tests make and drop many models, and Keras collects garbage between them. What is
# imported by now stays, so the collector need not look at it: a fifth of the time.
gc.freeze()
# A traced step is a million small objects that all live until it is compiled.
gc.set_threshold(50_000, 20, 50)
# TensorFlow keeps with every operation the stack that made it, which below pytest is
# deep: a tenth of the time to trace. Only its messages would name the lines.
_stack = tf_stack.extract_stack()
tf_stack.extract_stack = lambda stacklevel=1: _stack
# Graphs that run a few small steps are not worth optimizing.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def _without_autotuning(dataset):
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


# TensorFlow tunes each iterator in a thread that may sleep for up to a minute, and who
# drops the iterator waits for it. This is called with what is about to be iterated.
dataset_ops.DatasetV2._apply_debug_options = _without_autotuning

# The first call of many a property compiles something.
hypothesis.settings.register_profile("gshard", deadline=None, print_blob=True)
hypothesis.settings.load_profile("gshard")


@pytest.fixture(scope="module", autouse=True)
def _free_what_the_module_traced():
    """Collect garbage once a module, and let TensorFlow's graphs go.

    Its registry keeps the gradient function of each traced `tf.custom_gradient`, and
    with it the graph, for as long as the process lives: ten gigabytes in all.
    """
    yield
    keras.backend.clear_session(free_memory=False)
    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]
    gc.collect()


def pytest_xdist_auto_num_workers(config):
    """One worker more than cores: some wait for the processes that they started."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.broad(n)`: by default one case of n runs; the others are slow."""
    cases = {}
    for item in items:
        mark = item.get_closest_marker("broad")
        if mark is not None:
            number = cases.setdefault(item.nodeid.partition("[")[0], itertools.count())
            if next(number) % mark.args[0]:
                item.add_marker("slow")
