"""Plans stay as they are recorded: see `golden_plans.py` for how to record them."""

import importlib.util
import json
import pathlib

import pytest
from processes import run_python

FOLDER = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
ON_TPU = ("v3", "v5e")


# Each takes from a quarter of a minute to a minute.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_as_recorded(name):
    if any(chip in name for chip in ON_TPU):
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("needs libtpu: the extra aot")
    # In a process of its own, so that names are counted from the start.
    printed = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(FOLDER.parent)!r})
        import gshard_tf
        gshard_tf.request_cpu_devices(8)
        import golden_plans
        print("BEGIN" + golden_plans.as_text({name!r}))
        """
    )
    found = json.loads(printed.partition("BEGIN")[2])
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    assert found == recorded
