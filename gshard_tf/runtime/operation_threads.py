"""The threads in which TensorFlow runs operations."""

import os

import tensorflow as tf


def has_two_threads() -> bool:
    """Returns whether TensorFlow has two threads for operations, or more.

    By itself it makes one for each processor that the process may use, which are fewer
    than the machine has in many a container or job.
    """
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    threads = threads or int(os.environ.get("TF_NUM_INTEROP_THREADS", 0))
    if not threads and hasattr(os, "sched_getaffinity"):  # not on macOS
        threads = len(os.sched_getaffinity(0))
    return (threads or os.cpu_count() or 1) > 1
