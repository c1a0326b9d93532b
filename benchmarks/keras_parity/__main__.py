"""Keras 3, Keras 2 and the TF Model Garden on a mesh, against each on one device.

    python -m benchmarks.keras_parity [--json] [--api NAME ...] [--case NAME ...]

Each case trains a small model by an API without a mesh, and on meshes of 1, 2 and 8
virtual devices, with weights split by path rules. The figure is the largest relative
difference of any loss, metric, prediction, weight or slot. `model_garden` needs
tf-models-official, with TensorFlow 2.20 (the extra `model-garden`). Everything runs
without LLVM's optimizations, which take longer than the steps. The exit status is 1 if
a case is out of its tolerance.
"""

import importlib
import importlib.util
import os
import sys
import time
import warnings
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import gshard_tf
from benchmarks.harness.command_line import circumstances, make_parser, say, show
from benchmarks.keras_parity.case import MESHES, Case, compare, run

# The modules of Keras, and of the cases.
APIS = {
    "keras": ("keras", "keras_cases"),
    "tf_keras": ("tf_keras", "keras_cases"),
    "model_garden": ("tf_keras", "model_garden"),
}


def cases(api: str) -> dict[str, Case]:
    """Returns the cases of an API by name."""
    return importlib.import_module(f"benchmarks.keras_parity.{APIS[api][1]}").CASES


def differences(api: str, case: Case) -> dict[int, float]:
    """Returns the largest difference by number of devices."""
    keras = importlib.import_module(APIS[api][0])
    expected = run(case, keras)
    return {devices: compare(run(case, keras, devices), expected) for devices in MESHES}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table in Markdown of the largest difference over all meshes."""
    lines = [f"| case | what | {' | '.join(APIS)} |", "|---" * (2 + len(APIS)) + "|"]
    worst = {
        (row["case"], row["api"]): f"{max(row[n] for n in MESHES):.1e}" for row in rows
    }
    for case, feature in {row["case"]: row["feature"] for row in rows}.items():
        cells = [f"`{case}`", feature, *(worst.get((case, api), "") for api in APIS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--api", nargs="+", choices=APIS, default=list(APIS))
    parser.add_argument("--case", nargs="+", help="names; default: all")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    gshard_tf.request_cpu_devices(max(MESHES))
    start, rows, wrong = time.perf_counter(), [], 0
    for api in options.api:
        if api == "model_garden" and importlib.util.find_spec("official") is None:
            say("model_garden: tf-models-official is not installed")
            continue
        for name, case in cases(api).items():
            if options.case and name not in options.case:
                continue
            found = differences(api, case)
            wrong += max(found.values()) > case.tolerance
            rows.append({"api": api, "case": name, "feature": case.feature} | found)
            say(f"{api} {name}: " + ", ".join(f"{d:.1e}" for d in found.values()))
    if options.json:
        show({"rows": rows} | circumstances(start, quick=False), as_json=True)
    else:
        print(table(rows))
        show(circumstances(start, quick=False), as_json=False)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
