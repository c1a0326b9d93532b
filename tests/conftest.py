"""One process, eight virtual CPU devices, for every test that runs a mesh.

What needs another state of the process (jax already started, DTensor's device) runs
in a process of its own: see `processes.py`.
"""

import itertools
import os
import pathlib

import forks
import pytest
from xla_flags import QUICK_TO_COMPILE

HERE = pathlib.Path(__file__).resolve().parent

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Nothing here runs on a TPU, and libtpu complains loudly where it finds none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Plain TensorFlow has gradients of grouped convolutions by oneDNN alone, which it takes
# unasked on newer processors only.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Loads all that takes seconds, but not where tests are only handed out."""
    if hasattr(config, "workerinput"):
        forks.use(config.workerinput["forks"])
    if not config.pluginmanager.has_plugin("dsession"):
        import one_process  # noqa: F401


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tells each worker where one process forks for all."""
    node.workerinput["forks"] = forks.begin()


@pytest.fixture(scope="module", autouse=True)
def _free_what_the_module_traced():
    from one_process import free_what_was_traced

    yield
    free_what_was_traced()


def pytest_xdist_auto_num_workers(config):
    """One worker more than cores: some wait for the processes that they started."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.broad(n)`: by default one case of n runs; the others are slow.

    Files beside this one come first: they check the whole project by commands that take
    long, for which the other workers would wait at the end.
    """
    items.sort(key=lambda item: item.path.parent != HERE)
    cases = {}
    for item in items:
        mark = item.get_closest_marker("broad")
        if mark is not None:
            number = cases.setdefault(item.nodeid.partition("[")[0], itertools.count())
            if next(number) % mark.args[0]:
                item.add_marker("slow")
