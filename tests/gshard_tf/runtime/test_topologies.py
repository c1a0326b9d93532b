"""Compiling for TPU slices that are not there."""

import importlib.util

import pytest
from processes import run_python

from gshard_tf.runtime import devices

HAVE_COMPILER = importlib.util.find_spec("libtpu") is not None


def test_without_the_compiler_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gshard-tf\[aot\]'"):
        devices.topology_devices("v5e:2x4")


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_the_layer_compiles_for_tpus_and_wastes_nothing():
    # In a process of its own: libtpu stays once it is loaded.
    printed = run_python(
        """
        from benchmarks.moe.tpu import compile_layer
        import gshard_tf
        from gshard_tf.runtime.devices import topology_devices
        gshard_tf.request_cpu_devices(8)
        try:
            topology_devices("v99:1x1")
        except ValueError as error:
            print("Received: name='v99:1x1'" in str(error))
        row = compile_layer("v5e:2x4", 256, 1024)
        kinds = dict(sorted(row["collectives"].items()))
        print(row["flops_over_experts"] < 1.05, kinds)
        """
    )
    assert printed.split("\n")[:2] == [
        "True",
        "True {'all-reduce': 1, 'all-to-all': 4}",
    ]


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_the_environment_is_left_as_it_was():
    # (A machine that is asked about may have what jax sets itself.)
    printed = run_python(
        """
        import os, jax
        from gshard_tf.runtime.devices import topology_devices
        os.environ["TPU_SKIP_MDS_QUERY"] = "yes"
        before = dict(os.environ)
        # The two cores of a chip: two devices of v3 and tpu7x, one of v4.
        for name in ("v5e:2x4", "v3:2x2", "v4:2x2x1", "tpu7x:2x2x1"):
            print(len(topology_devices(name)))
        print(dict(os.environ) == before)
        """
    )
    assert printed.split() == ["8", "8", "4", "8", "True"]
