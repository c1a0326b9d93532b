"""Description of the machine that a figure was measured on."""

import contextlib
import importlib.metadata
import os
import platform


def describe() -> dict[str, str | int]:
    """The machine and the versions, for printing beside figures."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1] for line in file if "model name" in line]
        model = names[0].strip() if names else model
    versions = {}
    for name in ("tensorflow", "keras", "jax"):
        # (A program that travels is measured where there is no TensorFlow.)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), **versions}
