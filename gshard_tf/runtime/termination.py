"""SIGTERM: the step that runs ends, its state is saved, and all processes leave.

Schedulers stop a run by SIGTERM, to one of its processes or to all, and kill what is
still there when a grace period is over. Python runs the handler of a signal between
two instructions of its own, which a step in XLA holds up, and a step that waits for a
process that is gone holds up for ever. So a thread listens, and keeps the time.
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

from gshard_tf.runtime.process_group import group, next_turn

# sysexits.h calls it EX_TEMPFAIL: "the user is invited to retry".
GIVE_AGAIN = 75
_LISTEN_SECONDS = 0.5
# Of the grace period, what is left to the process to end in.
_RESERVE = 0.1

# Those that listen, the last one on top.
_LISTENING: list[Termination] = []


class Terminated(SystemExit):
    """Raised where a run that SIGTERM asked to end leaves; its code is `GIVE_AGAIN`."""

    def __init__(self) -> None:
        super().__init__(GIVE_AGAIN)


class Termination:
    """Between `start` and `close`, SIGTERM ends the run at the end of a step.

    With several processes, all of them make one at the same point, and count their
    steps alike. One that hears of a SIGTERM, its own or another's, tells how many steps
    it has begun; all leave after the largest of these numbers. So none waits in a step
    for one that has left.

    Args:
        grace: Seconds from the signal to the end of the process. Shortly before they
            are over, it ends in whatever it is doing.
        is_running: Whether what is to be saved still runs, given the frame in which the
            main thread is. Where an exception ended it, a SIGTERM goes to the handler
            that was there before.
        progress: What the message says of the state, when there is no time to save it.
    """

    def __init__(
        self,
        grace: float,
        is_running: Callable[[FrameType | None], bool],
        progress: Callable[[], str],
    ):
        self.grace = grace
        self.heard = False
        self._is_running = is_running
        self._progress = progress
        self._key = f"term/{next_turn()}"
        self._lock = threading.Lock()
        self._begun = 0
        self._last: int | None = None
        self._deadline = float("inf")
        self._came_here = False
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
        """Listens from now on. Only the main thread may: elsewhere, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        while _LISTENING and not _LISTENING[-1]._runs_still():
            _LISTENING[-1].close()
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        handler = signal.signal(signal.SIGTERM, self._handle)
        # The number of each signal arrives there at once, whatever Python is doing.
        wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = (handler or signal.SIG_DFL, wakeup)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        _LISTENING.append(self)
        self._thread.start()

    def close(self) -> None:
        """Gives the signal back. One that came too late for this one comes again."""
        if self._pipe is None:
            return
        self._over.set()
        self._give_back()
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None
        if self._came_here:
            os.kill(os.getpid(), signal.SIGTERM)

    def may_begin(self) -> bool:
        """Whether the next step may begin; False where the run is to leave before."""
        with self._lock:
            if not self.heard:
                self._begun += 1
                return True
        if self._begun >= self._last_step():
            return False
        self._begun += 1
        return True

    def is_due(self) -> bool:
        """Whether the step that just ended is the last one."""
        return self.heard and self._begun >= self._last_step()

    def leave(self, said: str) -> NoReturn:
        """Says how the run goes on, and ends it.

        Raises:
            Terminated: always.
        """
        self._came_here = False
        if self._pipe is not None:
            # The thread goes on: the end of the process has its time, too.
            self._give_back()
        _say(f"SIGTERM: {said} Give the same command again to go on.")
        raise Terminated

    def _last_step(self) -> int:
        if self._last is None:
            processes = group()
            self._last = max(
                self._begun
                if processes.count == 1
                else int(processes.hear(f"{self._key}/{i}", self.grace))
                for i in range(processes.count)
            )
        return self._last

    def _runs_still(self) -> bool:
        main = threading.main_thread().ident
        return self._is_running(sys._current_frames().get(main))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The thread does what is to be done; but signals are the main thread's.
        if not self._is_running(frame):
            self._came_here = True
            self.close()

    def _give_back(self) -> None:
        if self in _LISTENING:
            _LISTENING.remove(self)
            handler, wakeup = self._before
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(wakeup)

    def _listen(self) -> None:
        while not self._over.is_set():
            if select.select([self._pipe[0]], [], [], _LISTEN_SECONDS)[0]:
                numbers = os.read(self._pipe[0], 1 << 10)
                if self._before[1] != -1:
                    with contextlib.suppress(OSError):  # full: somebody is woken up
                        os.write(self._before[1], numbers)
                if signal.SIGTERM in numbers and self._runs_still():
                    self._came_here = True
                    self._hear()
            elif not self.heard and self._others_heard():
                self._hear()
            if time.monotonic() > self._deadline:
                _say(
                    f"SIGTERM: the step, or its checkpoint, did not end within "
                    f"{self.grace:g} s. {self._progress()} Give the same command again "
                    "to go on from there."
                )
                os._exit(GIVE_AGAIN)

    def _hear(self) -> None:
        with self._lock:
            if self.heard:
                return
            self.heard = True
            begun = self._begun
        self._deadline = time.monotonic() + (1 - _RESERVE) * self.grace
        group().tell(f"{self._key}/{group().index}", str(begun))

    def _others_heard(self) -> bool:
        if group().count == 1:
            return False
        try:
            return bool(group().overhear(self._key))
        except Exception:  # jaxlib has no narrower class for it
            return False  # The first process is gone, and `processes` ends the run.


def _forget_in_child() -> None:
    """A fork is no run: a SIGTERM to a worker of a pool ends that worker alone."""
    while _LISTENING:
        _LISTENING[-1]._give_back()


os.register_at_fork(after_in_child=_forget_in_child)


def _say(text: str) -> None:
    print(f"gshard_tf: {text}", file=sys.stderr, flush=True)
