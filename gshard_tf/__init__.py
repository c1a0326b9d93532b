"""GShard (arXiv 2006.16668) for Keras 3 on TensorFlow.

Names are imported when they are first used, so that `gshard_tf.portable` and
`python -m gshard_tf.runner` work where there is no TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gshard_tf import counter_rng, devices, portable
    from gshard_tf.annotations import (
        annotate,
        name_axes,
        named_axes,
        replicate,
        shard,
        split,
    )
    from gshard_tf.checkpoints.callback import SaveCheckpoints
    from gshard_tf.checkpoints.data import ResumableData
    from gshard_tf.checkpoints.manager import Checkpoints
    from gshard_tf.checkpoints.state import state_of
    from gshard_tf.compat.keras_calls import accumulated_batches
    from gshard_tf.devices import request_cpu_devices
    from gshard_tf.guard import GuardNumbers
    from gshard_tf.mesh import active_mesh, create_mesh, use_mesh
    from gshard_tf.planning.plan import Plan
    from gshard_tf.planning.planner import plan
    from gshard_tf.processes import join_processes, own_rows, stop_all
    from gshard_tf.rules import AxisRules
    from gshard_tf.strategy import SpmdStrategy
    from gshard_tf.tpu.strategy import tpu_strategy
    from gshard_tf.verification.callback import VerifyFirstStep
    from gshard_tf.verification.report import VerificationError, VerificationReport
    from gshard_tf.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AxisRules",
    "Checkpoints",
    "GuardNumbers",
    "Plan",
    "ResumableData",
    "SaveCheckpoints",
    "SpmdStrategy",
    "VerificationError",
    "VerificationReport",
    "VerifyFirstStep",
    "accumulated_batches",
    "active_mesh",
    "annotate",
    "counter_rng",
    "create_mesh",
    "devices",
    "join_processes",
    "name_axes",
    "named_axes",
    "own_rows",
    "plan",
    "portable",
    "replicate",
    "request_cpu_devices",
    "shard",
    "split",
    "state_of",
    "stop_all",
    "tpu_strategy",
    "use_mesh",
    "verify",
]

# Where each name is; None: it is a module of this package.
_HOME = {
    "AxisRules": "rules",
    "Checkpoints": "checkpoints.manager",
    "GuardNumbers": "guard",
    "Plan": "planning.plan",
    "ResumableData": "checkpoints.data",
    "SaveCheckpoints": "checkpoints.callback",
    "SpmdStrategy": "strategy",
    "VerificationError": "verification.report",
    "VerificationReport": "verification.report",
    "VerifyFirstStep": "verification.callback",
    "accumulated_batches": "compat.keras_calls",
    "active_mesh": "mesh",
    "annotate": "annotations",
    "counter_rng": None,
    "create_mesh": "mesh",
    "devices": None,
    "join_processes": "processes",
    "name_axes": "annotations",
    "named_axes": "annotations",
    "own_rows": "processes",
    "plan": "planning.planner",
    "portable": None,
    "replicate": "annotations",
    "request_cpu_devices": "devices",
    "shard": "annotations",
    "split": "annotations",
    "tpu_strategy": "tpu.strategy",
    "state_of": "checkpoints.state",
    "stop_all": "processes",
    "use_mesh": "mesh",
    "verify": "verification.verify",
}
# They need neither TensorFlow nor the versions that it is tested with.
_ALONE = ("devices", "portable")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _ALONE:
        from gshard_tf.versions import check

        check()
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
