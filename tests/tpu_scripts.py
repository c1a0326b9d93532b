"""Runs a script of tests/gshard_tf/tpu in a process of its own.

A TPU's topology, TensorFlow's devices and its bridge are set once per process.
"""

import json
import pathlib

from processes import ROOT, run_python

HERE = pathlib.Path(__file__).parent / "gshard_tf" / "tpu"


def run_script(name, *arguments, **options):
    """Runs a script and returns the JSON that it prints last."""
    printed = run_python(
        f"""
        import runpy, sys
        sys.path[:0] = [{str(HERE)!r}, {str(ROOT)!r}]
        sys.argv = {[name, *map(str, arguments)]!r}
        runpy.run_path({str(HERE / name)!r}, run_name="__main__")
        """,
        **options,
    )
    return json.loads(printed.strip().splitlines()[-1])
