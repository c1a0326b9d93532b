import pathlib
import sys

import keras
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
for folder in (TESTS.parent, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Fixed seeds, and no graph, name or policy left from the test before."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1234)
    yield
    keras.config.set_dtype_policy("float32")
