"""TensorFlow, Keras and jax in a process that runs tests: on import, they start."""

import gc

import hypothesis
import jax
import keras
import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops
from tensorflow.python.framework import ops
from tensorflow.python.util import tf_stack
from xla_flags import flags_for_libraries, use_older_emitter

import gshard_tf

use_older_emitter()
gshard_tf.request_cpu_devices(8)
with flags_for_libraries():
    # jax starts here, so that no test in this process can ask for another number.
    jax.devices()
    tf.function(lambda: tf.zeros(()), jit_compile=True)()

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


def free_what_was_traced():
    """Collects garbage, and lets TensorFlow's graphs go.

    Its registry keeps the gradient function of each traced `tf.custom_gradient`, and
    with it the graph, for as long as the process lives: ten gigabytes in all.
    """
    keras.backend.clear_session(free_memory=False)
    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]
    gc.collect()
