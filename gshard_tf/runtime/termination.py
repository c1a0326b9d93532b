"""SIGTERM: the current step ends, its state is saved, and all processes exit.

Schedulers stop a run by SIGTERM, to one of its processes or to all, and kill what still
runs when a grace period is over. Python runs the handler of a signal between two
instructions of its own, which a step in XLA delays, and a step that waits for a process
that is gone delays forever. So a thread listens, and keeps the time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from gshard_tf.runtime.process_group import group, next_collective_id

_LISTEN_SECONDS = 0.5
# The share of the grace period that is left for the end of the process.
_RESERVE = 0.1

# Those that listen, the latest one last.
_LISTENING: list[Termination] = []


class Terminated(SystemExit):
    """Raised where a run exits on SIGTERM; its code is `os.EX_TEMPFAIL`.

    `sysexits.h` on that code: "the user is invited to retry".
    """

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class Termination:
    """Ends the run at the end of a step on SIGTERM, between `start` and `close`.

    With several processes, all of them make one at the same point, and count their
    steps alike. One that learns of a SIGTERM, its own or another's, sends the number of
    steps it has begun; all leave after the largest of these numbers. So none waits in a
    step for one that has left.

    Args:
        grace: Seconds from the signal to the end of the process. Shortly before they
            are over, it ends in whatever it is doing.
        is_running: Returns whether the run continues, given the current frame of the
            main thread. Where an exception ended it, a SIGTERM goes to the handler
            that was set before.
        progress: Returns a sentence about the saved state, for the message when there
            is no time to save it.

    Attributes:
        is_requested: Whether a SIGTERM came, to this process or another.
    """

    def __init__(
        self,
        grace: float,
        is_running: Callable[[FrameType | None], bool],
        progress: Callable[[], str],
    ):
        self.grace = grace
        self.is_requested = False
        self._is_running = is_running
        self._progress = progress
        self._key = f"term/{next_collective_id()}"
        self._lock = threading.Lock()
        self._begun = 0
        self._last_step: int | None = None
        self._deadline = float("inf")
        self._was_signaled = False
        self._over = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._before: tuple[Any, int] = (signal.SIG_DFL, -1)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Termination:
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, Terminated):
            self.close()

    def start(self) -> None:
        """Starts to listen. Only the main thread may: elsewhere, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        while _LISTENING and not _LISTENING[-1].still_runs():
            _LISTENING[-1].close()
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        handler = signal.signal(signal.SIGTERM, self._handle)
        # The number of each signal arrives there at once, whatever Python is doing.
        wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = (handler or signal.SIG_DFL, wakeup)
        self._thread = threading.Thread(
            target=self._listen, args=(self._pipe[0],), daemon=True
        )
        _LISTENING.append(self)
        self._thread.start()

    def close(self) -> None:
        """Restores the signal's handler; a signal that came too late is sent again."""
        if self._pipe is None or self._thread is None:
            return
        self._over.set()
        self.restore_handler()
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None
        if self._was_signaled:
            os.kill(os.getpid(), signal.SIGTERM)

    def may_begin(self) -> bool:
        """Returns whether the next step may begin, or the run must leave before it."""
        with self._lock:
            if not self.is_requested:
                self._begun += 1
                return True
        if self._begun >= self._agreed_last_step():
            return False
        self._begun += 1
        return True

    def is_due(self) -> bool:
        """Returns whether the step that just ended is the last one."""
        return self.is_requested and self._begun >= self._agreed_last_step()

    def leave(self, message: str) -> NoReturn:
        """Prints how to resume the run, and ends it.

        Raises:
            Terminated: always.
        """
        self._was_signaled = False
        if self._pipe is not None:
            # The thread continues: the end of the process has its time, too.
            self.restore_handler()
        _print(f"SIGTERM: {message} Give the same command again to go on.")
        raise Terminated

    def _agreed_last_step(self) -> int:
        if self._last_step is None:
            processes = group()
            self._last_step = max(
                self._begun
                if processes.count == 1
                else int(processes.get(f"{self._key}/{i}", self.grace))
                for i in range(processes.count)
            )
        return self._last_step

    def still_runs(self) -> bool:
        """Returns whether the main thread is still in the loop that listens."""
        main = threading.main_thread().ident
        # Documented, in spite of its name.
        frames = sys._current_frames()  # noqa: SLF001
        frame = None if main is None else frames.get(main)
        return self._is_running(frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The thread acts on the signal; but only the main thread sets handlers.
        if not self._is_running(frame):
            self._was_signaled = True
            self.close()

    def restore_handler(self) -> None:
        """Stops to listen: SIGTERM does again what it did before."""
        if self in _LISTENING:
            _LISTENING.remove(self)
            handler, wakeup = self._before
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(wakeup)

    def _listen(self, reader: int) -> None:
        while not self._over.is_set():
            if select.select([reader], [], [], _LISTEN_SECONDS)[0]:
                numbers = os.read(reader, 1 << 10)
                if self._before[1] != -1:
                    # Where that one is full, its reader wakes up anyway.
                    with contextlib.suppress(OSError):
                        os.write(self._before[1], numbers)
                if signal.SIGTERM in numbers and self.still_runs():
                    self._was_signaled = True
                    self._request()
            elif not self.is_requested and self._others_requested():
                self._request()
            if time.monotonic() > self._deadline:
                _print(
                    f"SIGTERM: the step, or its checkpoint, did not end within "
                    f"{self.grace:g} s. {self._progress()} Give the same command again "
                    "to go on from there."
                )
                os._exit(os.EX_TEMPFAIL)

    def _request(self) -> None:
        with self._lock:
            if self.is_requested:
                return
            self.is_requested = True
            begun = self._begun
        self._deadline = time.monotonic() + (1 - _RESERVE) * self.grace
        group().put(f"{self._key}/{group().index}", str(begun))

    def _others_requested(self) -> bool:
        if group().count == 1:
            return False
        try:
            return bool(group().list(self._key))
        except Exception:  # jaxlib has no narrower class for it
            return False  # The first process is gone, and the watchdog ends the run.


def _forget_in_child() -> None:
    """Restores the handlers: a SIGTERM to a worker of a pool ends that worker alone."""
    while _LISTENING:
        _LISTENING[-1].restore_handler()


os.register_at_fork(after_in_child=_forget_in_child)


def _print(text: str) -> None:
    print(f"gshard_tf: {text}", file=sys.stderr, flush=True)
