"""How XLA compiles in tests, which compile much and compute little.

Without the optimizer of LLVM, with the older emitter of fusions and without splitting a
module for several threads, a program compiles in a tenth of the time. Users do not
compile so, and rounding differs: see `test_parity_default_level.py` for the same at
XLA's defaults.
"""

import contextlib
import os
from importlib.metadata import version

QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
# jaxlib 0.12 has one emitter.
TWO_EMITTERS = int(version("jaxlib").split(".")[1]) < 11
EMITTER = "xla_cpu_use_fusion_emitters"


def use_older_emitter():
    """In this process, for what gshard-tf compiles."""
    from gshard_tf.compat import xla

    if TWO_EMITTERS:
        xla._CPU[EMITTER] = False


@contextlib.contextmanager
def flags_for_libraries():
    """While it lasts, TensorFlow and jax can read the flags of all that they compile.

    Each reads them once, when it starts. Afterwards the environment has the flag of the
    emitter no more: libtpu ends the process at one that it does not know.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if TWO_EMITTERS:
        os.environ["XLA_FLAGS"] = f"{flags} --{EMITTER}=false"
    yield
    os.environ["XLA_FLAGS"] = flags
