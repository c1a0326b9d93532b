"""GShard (arXiv 2006.16668) for Keras 3 on TensorFlow."""

from gshard_tf.versions import check_backend, check_versions

check_versions()

import keras  # noqa: E402

check_backend(keras.backend.backend())

from gshard_tf import counter_rng  # noqa: E402
from gshard_tf.annotations import (  # noqa: E402
    annotate,
    name_axes,
    named_axes,
    replicate,
    shard,
    split,
)
from gshard_tf.devices import request_cpu_devices  # noqa: E402
from gshard_tf.mesh import active_mesh, create_mesh, use_mesh  # noqa: E402
from gshard_tf.planning.plan import Plan  # noqa: E402
from gshard_tf.planning.planner import plan  # noqa: E402
from gshard_tf.rules import AxisRules  # noqa: E402
from gshard_tf.strategy import SpmdStrategy  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AxisRules",
    "Plan",
    "SpmdStrategy",
    "active_mesh",
    "annotate",
    "counter_rng",
    "create_mesh",
    "name_axes",
    "named_axes",
    "plan",
    "replicate",
    "request_cpu_devices",
    "shard",
    "split",
    "use_mesh",
]
