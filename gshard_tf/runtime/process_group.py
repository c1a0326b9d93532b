"""The processes of a run: messages between them, and the sections they enter together.

Without `initialize` there is one process, and everything here is trivial. Of jax, the
folder `runtime` uses what starts and connects processes; arrays and programs belong to
`spmd.program`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees it.

    Attributes:
        index: The number of this process.
        count: The number of processes.
        client: jax's client of the coordination service; None with one process.
    """

    index: int = 0
    count: int = 1
    client: Any = None

    @property
    def is_chief(self) -> bool:
        """True in the process that does what only one may do: logs, lists of files."""
        return self.index == 0

    def put(self, key: str, text: str) -> None:
        """Sets the value of a key, which the other processes can get."""
        if self.client is not None:
            self.client.key_value_set(f"gshard/{key}", text, allow_overwrite=True)

    def get(self, key: str, timeout: float) -> str:
        """Returns the value of a key, and waits until a process puts it.

        Args:
            key: The key.
            timeout: Seconds.

        Raises:
            TimeoutError: when no value came in time.
        """
        try:
            with _RUN.getting(key):
                return self.client.blocking_key_value_get(
                    f"gshard/{key}", int(1000 * timeout)
                )
        except Exception as error:  # jaxlib has no narrower class for it
            raise TimeoutError(
                f"No value of {key!r} came from another process in {timeout:g} s: "
                f"{error}"
            ) from error

    def list(self, prefix: str) -> dict[str, str]:
        """Returns the values put so far under `PREFIX/`, by key, without waiting."""
        prefix = f"gshard/{prefix}/"
        entries = self.client.key_value_dir_get(prefix)
        return {key.removeprefix(prefix): value for key, value in entries}

    def all_gather(self, key: str, text: str, timeout: float) -> tuple[str, ...]:
        """Returns the texts that all processes give under a key, in their order."""
        if self.count == 1:
            return (text,)
        self.put(f"{key}/{self.index}", text)
        return tuple(self.get(f"{key}/{i}", timeout) for i in range(self.count))


class RunState:
    """The group, and the progress of this process in the run.

    Attributes:
        group: The processes.
        section_count: The number of collective sections this process has entered.
        section: The name of the latest one.
        waiting_since: The time at which this process entered the section it is in; None
            outside of sections.
        collective_failed: Whether a section raised: another process may be gone.
        over: Set when this process ends, in success or failure.
        ending: A lock that the thread which ends this process keeps.
    """

    def __init__(self) -> None:
        self.group = ProcessGroup()
        self.section_count = 0
        self.section = ""
        self.waiting_since: float | None = None
        self.collective_failed = False
        self.over = threading.Event()
        self.ending = threading.Lock()
        self._ids = itertools.count()
        # Keys that are awaited, and since when.
        self._awaited: dict[str, float] = {}

    def next_id(self) -> int:
        """Returns the next sequence number."""
        return next(self._ids)

    @contextlib.contextmanager
    def getting(self, key: str) -> Iterator[None]:
        """Records that this process awaits a key."""
        self._awaited[key] = time.monotonic()
        try:
            yield
        finally:
            self._awaited.pop(key, None)

    def waits_for(self) -> tuple[str, float] | None:
        """Returns the section or key that needs the others, and since when, or None."""
        since = self.waiting_since
        if since is not None:
            return self.section, since
        return min(list(self._awaited.items()), key=lambda kv: kv[1], default=None)


_RUN = RunState()


def run_state() -> RunState:
    """Returns the state of this process's run."""
    return _RUN


def group() -> ProcessGroup:
    """Returns the processes of this run."""
    return _RUN.group


def next_collective_id() -> int:
    """Returns the next sequence number, identical on every process."""
    return _RUN.next_id()


def all_gather_text(name: str, text: str, timeout: float = 600) -> tuple[str, ...]:
    """Returns the text of each process; all of them call this at the same point."""
    key = f"agree/{name}/{next_collective_id()}"
    return _RUN.group.all_gather(key, text, timeout)


@contextlib.contextmanager
def collective_section(name: str) -> Iterator[None]:
    """Marks a section that every process must enter; the watchdog times it."""
    if _RUN.group.count == 1:
        yield
        return
    _RUN.section_count += 1
    _RUN.section = name
    _RUN.waiting_since = time.monotonic()
    try:
        yield
    except Exception:
        _RUN.collective_failed = True
        raise
    finally:
        _RUN.waiting_since = None
