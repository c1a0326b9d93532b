"""One run in several processes: joining it, and stopping together.

Every host runs the same script, which calls `join_processes` first. Without it there is
one process, and everything here is trivial. Of jax this file knows what starts and
connects processes; arrays and programs are `spmd.program`'s.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from gshard_tf.runtime.relay import Relay
from gshard_tf.runtime.watchdog import BEAT_SECONDS, STOPPED_BY_ANOTHER, Watch

# How long the first process, which carries the messages, waits for the others to
# have heard why the run ends.
_FAREWELL_SECONDS = 10
# jax aborts, with a stack of C++, whoever survives a process that it takes for dead.
# Here `Watch` looks after that, so jax waits longer than any run takes.
_NEVER_SECONDS = 10**7


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
        index: Which one this is.
        count: How many there are.
        client: jax's client of the coordination service; None with one process.
    """

    index: int = 0
    count: int = 1
    client: Any = None

    @property
    def is_chief(self) -> bool:
        """Whether this process does what only one is to do: logs, lists of files."""
        return self.index == 0

    def tell(self, key: str, text: str) -> None:
        """Tells something to the others."""
        if self.client is not None:
            self.client.key_value_set(f"gshard/{key}", text, allow_overwrite=True)

    def hear(self, key: str, seconds: float) -> str:
        """Waits for what another process tells.

        Raises:
            TimeoutError: when nothing came.
        """
        try:
            with _RUN.hearing(key):
                return self.client.blocking_key_value_get(
                    f"gshard/{key}", int(1000 * seconds)
                )
        except Exception as error:  # jaxlib has no narrower class for it
            raise TimeoutError(
                f"No word from another process about {key!r} in {seconds:g} s: {error}"
            ) from error

    def overhear(self, folder: str) -> dict[str, str]:
        """What was told so far under a prefix, without waiting."""
        prefix = f"gshard/{folder}/"
        found = self.client.key_value_dir_get(prefix)
        return {key.removeprefix(prefix): value for key, value in found}

    def collect(self, key: str, text: str, seconds: float) -> list[str]:
        """Every process tells something and hears what all of them tell, in order."""
        if self.count == 1:
            return [text]
        self.tell(f"{key}/{self.index}", text)
        return [self.hear(f"{key}/{i}", seconds) for i in range(self.count)]


class _Run:
    """The group, and where this process is in its run."""

    def __init__(self):
        self.group = Group()
        # Counts what all processes have to do together: a step of a program, say.
        self.turn = 0
        self.waiting_since: float | None = None
        self.what = ""
        # Whether a step failed that needs all processes: one may be gone.
        self.broke_off = False
        # Set when this process ends, well or not; held by the thread that ends it.
        self.over = threading.Event()
        self.ending = threading.Lock()
        self.rounds = itertools.count()
        # What is waited for in messages, and since when.
        self.heard_for: dict[str, float] = {}

    @contextlib.contextmanager
    def hearing(self, key: str) -> Iterator[None]:
        self.heard_for[key] = time.monotonic()
        try:
            yield
        finally:
            self.heard_for.pop(key, None)

    def waits_for(self) -> tuple[str, float] | None:
        """What this process needs the others for, and since when, if it does."""
        since = self.waiting_since
        if since is not None:
            return self.what, since
        return min(list(self.heard_for.items()), key=lambda kv: kv[1], default=None)


_RUN = _Run()


def group() -> Group:
    """The processes of this run."""
    return _RUN.group


def next_turn() -> int:
    """A number that all processes get alike, and that was never given before."""
    return next(_RUN.rounds)


def agree(what: str, text: str, seconds: float = 600) -> list[str]:
    """What each process says to a question that all of them ask at the same point."""
    return _RUN.group.collect(f"agree/{what}/{next_turn()}", text, seconds)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Around whatever needs all processes: how long it takes is being watched."""
    if _RUN.group.count == 1:
        yield
        return
    _RUN.turn += 1
    _RUN.what = what
    _RUN.waiting_since = time.monotonic()
    try:
        yield
    except Exception:
        _RUN.broke_off = True
        raise
    finally:
        _RUN.waiting_since = None


def join_processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    patience: float = 300,
    heartbeat: float = 30,
    quiet: bool = True,
) -> Group:
    """Joins the processes of a run; every one of them calls it first.

    ```bash
    GSHARD_COORDINATOR=host0:8476 GSHARD_PROCESSES=2 GSHARD_PROCESS=0 python train.py
    ```

    Their devices, in the order of the processes, are those of a mesh. When one process
    fails, all end: each with the message of the one that failed.

    Args:
        coordinator: Address and port of the first process, which the others can reach.
            Defaults to the environment's `GSHARD_COORDINATOR`.
        count: How many processes there are. Defaults to `GSHARD_PROCESSES`; 1 when
            neither is given, and nothing happens.
        index: Which one this is, from 0. Defaults to `GSHARD_PROCESS`.
        patience: After how many seconds in one step a process asks who holds it up, and
            ends the run. Longer than the longest compilation. So long it waits for
            the others to join, too, and then ends by the exit code 70.
        heartbeat: After how many seconds without a sign of life a process is taken for
            dead. (One that dies in the middle of a step is noticed at once, and one
            that ends while others need it after about a second.)
        quiet: Whether only the first process writes to the standard output. Errors are
            written by all.

    Returns:
        The group; its `is_chief` says who writes logs.

    Raises:
        ValueError: when the numbers do not fit each other.
        RuntimeError: when jax has already started.
    """
    coordinator = coordinator or os.environ.get("GSHARD_COORDINATOR")
    count = int(os.environ.get("GSHARD_PROCESSES", 1)) if count is None else count
    index = int(os.environ.get("GSHARD_PROCESS", 0)) if index is None else index
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            "Processes are counted from 0, and there is at least one. Received: "
            f"process {index} of {count}"
        )
    if count == 1:
        return _RUN.group
    if not coordinator:
        raise ValueError(
            "Processes find each other at the address of the first one: give "
            "coordinator='host:port', or set GSHARD_COORDINATOR. Received: None"
        )
    import jax

    if quiet and index:
        # The file itself: gloo's connections talk, and they are no Python.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    # It would take SIGTERM for itself, and tell nobody who does not ask.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs; GPUs have NCCL.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    relay = None
    if index:
        host, _, port = coordinator.rpartition(":")
        relay = Relay(host.strip("[]"), int(port), heartbeat)
    with _patience_to_join(
        f"process {index} of {count} has waited {patience:g} s for the others at "
        f"{coordinator}: give all of them this address and this number of processes",
        patience,
    ):
        jax.distributed.initialize(
            coordinator_address=coordinator if relay is None else relay.address,
            num_processes=count,
            process_id=index,
            initialization_timeout=_NEVER_SECONDS,
            heartbeat_timeout_seconds=_NEVER_SECONDS,
            shutdown_timeout_seconds=int(heartbeat),
        )
    # Private API: messages between processes have no public form. On an upgrade, check
    # that the client still has `key_value_set`, `blocking_key_value_get` and
    # `key_value_dir_get`.
    from jax._src import distributed

    _RUN.group = Group(index, count, distributed.global_state.client)
    watch = Watch(_RUN, relay, patience, heartbeat, say_and_exit)
    sys.excepthook = _end_with_all
    # Before jax's own, which was registered earlier, disconnects.
    atexit.register(watch.part)
    watch.start()
    return _RUN.group


@contextlib.contextmanager
def _patience_to_join(text: str, seconds: float) -> Iterator[None]:
    """Around joining, which jax would end by aborting, with a stack of C++."""
    joined = threading.Event()

    def wait() -> None:
        if not joined.wait(seconds):
            say_and_exit(text, STOPPED_BY_ANOTHER, tell=False)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _end_with_all(kind: type, error: BaseException, trace: Any) -> None:
    """Instead of Python's own end after an exception: the others end too."""
    traceback.print_exception(kind, error, trace)
    message = "".join(traceback.format_exception_only(kind, error)).strip()
    silent = _who_is_silent() if _RUN.broke_off else ""
    if silent:
        index, count = _RUN.group.index, _RUN.group.count
        text = f"process {index} of {count} stops: {silent}{message}"
        say_and_exit(text, STOPPED_BY_ANOTHER, tell=True)
    stop_all(message)


def _who_is_silent() -> str:
    """Which processes do not tell any more where they are."""
    try:
        before = _RUN.group.overhear("progress")
        time.sleep(6 * BEAT_SECONDS)
        after = _RUN.group.overhear("progress")
    except Exception:  # jaxlib has no narrower class for it
        return "the first process, which coordinates the run, is gone; "
    silent = [i for i, told in sorted(after.items()) if told == before.get(i)]
    return "".join(f"process {i} gives no sign of life; " for i in silent)


def stop_all(message: str) -> None:
    """Ends all processes of the run, this one at once; each prints `message`."""
    processes = _RUN.group
    text = f"process {processes.index} of {processes.count} failed: {message}"
    say_and_exit(text, 1, tell=True)


def say_and_exit(text: str, code: int, tell: bool) -> None:
    """Prints `text` and ends this process; the first one only once all have heard."""
    processes = _RUN.group
    _RUN.ending.acquire()  # a second thread waits here for the end of the process
    _RUN.over.set()
    print(f"gshard_tf: {text}", file=sys.stderr, flush=True)

    def farewell() -> None:
        with contextlib.suppress(Exception):  # the service may be gone with its process
            if tell:
                processes.tell(f"end/{processes.index}", text)
            processes.tell(f"heard/{processes.index}", "")
            while processes.is_chief:
                if len(processes.overhear("heard")) == processes.count:
                    break
                time.sleep(0.1)

    # A service whose process hangs does not answer.
    speaking = threading.Thread(target=farewell, daemon=True)
    speaking.start()
    speaking.join(_FAREWELL_SECONDS if processes.is_chief else 2 * BEAT_SECONDS)
    # Without jax's own shutdown, which would wait for processes that are gone.
    os._exit(code)
