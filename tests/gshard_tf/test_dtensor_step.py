"""Training an `MoELayer` on a DTensor mesh, by hand, against one device."""

import json
import pathlib

import pytest
from processes import run_python

HERE = pathlib.Path(__file__).parent


def found(*arguments):
    # DTensor's device stays for the life of a process.
    printed = run_python(
        f"""
        import runpy, sys
        sys.argv = {["dtensor_step.py", *arguments]!r}
        runpy.run_path({str(HERE / "dtensor_step.py")!r}, run_name="__main__")
        """
    )
    return json.loads(printed.strip().splitlines()[-1])


def assert_as_on_one_device(run):
    assert run["losses"] < 1e-6
    assert run["weights"] < 1e-6
    assert run["moved"] > 0.001
    router, inward, outward = run["layouts"]
    assert router == ["unsharded", "unsharded"]
    assert inward == outward == ["expert", "unsharded", "unsharded"]


def test_a_step_is_that_of_one_device():
    assert_as_on_one_device(found("eager", "adam")["adam"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "function"])
def test_a_step_of_any_optimizer_is_that_of_one_device(how):
    run = found(how, "sgd", "adam", "adafactor")
    for optimizer in ("sgd", "adam", "adafactor"):
        assert_as_on_one_device(run[optimizer])


@pytest.mark.slow
def test_in_a_function_slots_must_lie_as_their_weights_do():
    # Not what we wish, but what the guide warns of: nothing raises.
    assert found("replicated", "adam")["adam"]["weights"] > 0.01
