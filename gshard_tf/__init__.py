"""GShard (arXiv 2006.16668) for Keras 3 on TensorFlow.

Names are imported when they are first used, so that `gshard_tf.export` and
`python -m gshard_tf.export.runner` work where there is no TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gshard_tf import data, export, optimizers, random
    from gshard_tf.callbacks.checkpoint import CheckpointCallback
    from gshard_tf.callbacks.nonfinite_guard import NonFiniteGuard
    from gshard_tf.callbacks.verify_first_step import VerifyFirstStep
    from gshard_tf.checkpoints.dataset import ResumableDataset
    from gshard_tf.checkpoints.manager import CheckpointManager
    from gshard_tf.checkpoints.training_state import training_state
    from gshard_tf.compat.keras_calls import accumulated_batches
    from gshard_tf.parallel.halo import (
        halo_average_pool,
        halo_convolution,
        halo_max_pool,
        halo_transposed_convolution,
    )
    from gshard_tf.parallel.ragged_dispatch import RaggedDispatch
    from gshard_tf.parallel.ring_attention import ring_attention
    from gshard_tf.planning.plan import Plan
    from gshard_tf.planning.planner import plan
    from gshard_tf.planning.search.find_layout import find_layout
    from gshard_tf.planning.search.layout_search import LayoutSearch
    from gshard_tf.runtime.devices import device_count, request_cpu_devices
    from gshard_tf.runtime.initialize import initialize
    from gshard_tf.runtime.watchdog import abort_all
    from gshard_tf.sharding.annotations import (
        annotate,
        logical_axes,
        name_axes,
        replicate,
        shard,
        split,
    )
    from gshard_tf.sharding.layout_map import LayoutMapRules
    from gshard_tf.sharding.manual import manual, mesh_axis
    from gshard_tf.sharding.mesh import active_mesh, create_mesh, use_mesh
    from gshard_tf.sharding.rules import AxisRules
    from gshard_tf.sharding.vectorize import record_pipeline, vmap
    from gshard_tf.spmd.local_batches import process_local_rows
    from gshard_tf.spmd.strategy import SpmdStrategy
    from gshard_tf.tpu.strategy import tpu_strategy
    from gshard_tf.verification.report import VerificationError, VerificationReport
    from gshard_tf.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AxisRules",
    "CheckpointManager",
    "LayoutMapRules",
    "LayoutSearch",
    "NonFiniteGuard",
    "Plan",
    "RaggedDispatch",
    "ResumableDataset",
    "CheckpointCallback",
    "SpmdStrategy",
    "VerificationError",
    "VerificationReport",
    "VerifyFirstStep",
    "accumulated_batches",
    "active_mesh",
    "annotate",
    "random",
    "create_mesh",
    "data",
    "device_count",
    "find_layout",
    "halo_average_pool",
    "halo_convolution",
    "halo_max_pool",
    "halo_transposed_convolution",
    "initialize",
    "manual",
    "mesh_axis",
    "name_axes",
    "optimizers",
    "logical_axes",
    "plan",
    "process_local_rows",
    "record_pipeline",
    "export",
    "replicate",
    "request_cpu_devices",
    "ring_attention",
    "shard",
    "split",
    "training_state",
    "abort_all",
    "tpu_strategy",
    "use_mesh",
    "verify",
    "vmap",
]

# Where each name is; None: it is a module of this package.
_HOME = {
    "AxisRules": "sharding.rules",
    "CheckpointManager": "checkpoints.manager",
    "LayoutMapRules": "sharding.layout_map",
    "LayoutSearch": "planning.search.layout_search",
    "NonFiniteGuard": "callbacks.nonfinite_guard",
    "Plan": "planning.plan",
    "RaggedDispatch": "parallel.ragged_dispatch",
    "ResumableDataset": "checkpoints.dataset",
    "CheckpointCallback": "callbacks.checkpoint",
    "SpmdStrategy": "spmd.strategy",
    "VerificationError": "verification.report",
    "VerificationReport": "verification.report",
    "VerifyFirstStep": "callbacks.verify_first_step",
    "accumulated_batches": "compat.keras_calls",
    "active_mesh": "sharding.mesh",
    "annotate": "sharding.annotations",
    "optimizers": None,
    "random": None,
    "create_mesh": "sharding.mesh",
    "data": None,
    "device_count": "runtime.devices",
    "find_layout": "planning.search.find_layout",
    "halo_average_pool": "parallel.halo",
    "halo_convolution": "parallel.halo",
    "halo_max_pool": "parallel.halo",
    "halo_transposed_convolution": "parallel.halo",
    "initialize": "runtime.initialize",
    "manual": "sharding.manual",
    "mesh_axis": "sharding.manual",
    "name_axes": "sharding.annotations",
    "logical_axes": "sharding.annotations",
    "plan": "planning.planner",
    "process_local_rows": "spmd.local_batches",
    "export": None,
    "record_pipeline": "sharding.vectorize",
    "replicate": "sharding.annotations",
    "request_cpu_devices": "runtime.devices",
    "ring_attention": "parallel.ring_attention",
    "shard": "sharding.annotations",
    "split": "sharding.annotations",
    "tpu_strategy": "tpu.strategy",
    "training_state": "checkpoints.training_state",
    "abort_all": "runtime.watchdog",
    "use_mesh": "sharding.mesh",
    "verify": "verification.verify",
    "vmap": "sharding.vectorize",
}
# They need neither TensorFlow nor the versions that it is tested with.
_ALONE = ("device_count", "export", "request_cpu_devices")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _ALONE:
        from gshard_tf.compat.versions import check

        check()
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
