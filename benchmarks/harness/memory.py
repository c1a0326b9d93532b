"""Resident memory of this process, and its peak since a chosen moment (Linux)."""

import ctypes
import gc

_STATUS = "/proc/self/status"


def resident() -> int:
    """Bytes resident now, less what the allocator holds without using it."""
    _trim()
    return _field("VmRSS")


def reset_peak() -> None:
    """Makes `peak` count from now on."""
    _trim()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak of the resident set: proc(5)


def peak() -> int:
    """The most bytes resident since `reset_peak`, or since the process began."""
    return _field("VmHWM")


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _field(name: str) -> int:
    with open(_STATUS, encoding="ascii") as file:
        for line in file:
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
    raise RuntimeError(f"The system does not tell {name} in {_STATUS}.")
