"""Watchdog: ends all processes of a run when one fails, dies or hangs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType

from gshard_tf.runtime.process_group import RunState, run_state
from gshard_tf.runtime.relay import Relay

# The exit code of a process that ends because another one failed.
ABORTED_BY_ANOTHER = 70
BEAT_SECONDS = 0.5
_LOOK_SECONDS = 0.25
# How long the first process, which carries the messages, waits until the others know
# why the run ends.
_SHUTDOWN_GRACE_SECONDS = 10


class Watchdog:
    """Ends this process when another one has ended, or blocks it for too long.

    One thread talks to the coordination service, which may not answer; another one
    looks at the answers, and ends the process.
    """

    def __init__(
        self,
        run: RunState,
        relay: Relay | None,
        step_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        """Starts nothing yet; `initialize` describes the arguments."""
        self.run = run
        self.group = run.group
        self.relay = relay
        self.step_timeout = step_timeout
        self.heartbeat_timeout = heartbeat_timeout
        # The latest answers: why processes ended, who has left, and all progress.
        self.ends: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.progress: dict[str, str] = {}
        self.beats = 0
        self.error: Exception | None = None
        # The number of beats since the progress of each process changed.
        self.silent_beats: dict[str, int] = {}

    def start(self) -> None:
        """Announces this process to the others, and starts to watch them."""
        self._beat()
        for target in (self._talk, self._look):
            threading.Thread(target=target, daemon=True).start()

    def leave(self) -> None:
        """Leaves the run together with the other processes, at this process's end."""
        with contextlib.suppress(Exception):  # the service is gone: `_look` ends it
            self.group.put(f"left/{self.group.index}", str(self.run.section_count))
        while not self.run.over.wait(0.1):
            if len(self.left) == self.group.count:
                self.run.over.set()

    def _talk(self) -> None:
        while not self.run.over.wait(BEAT_SECONDS):
            try:
                self._beat()
            except Exception as error:  # jaxlib has no narrower class for it
                self.error = error
                return

    def _beat(self) -> None:
        group, before = self.group, self.progress
        group.put(f"progress/{group.index}", f"{self.run.section_count} {self.beats}")
        self.ends = group.list("end")
        self.left = group.list("left")
        self.progress = group.list("progress")
        for index, progress in self.progress.items():
            beats = self.silent_beats.get(index, 0) + 1
            self.silent_beats[index] = beats if progress == before.get(index) else 0
        self.beats += 1

    def _look(self) -> None:
        # Beats and looks are counted, not seconds: no process counts as silent while
        # this one is stopped, or Python is blocked.
        looks, beats = 0, 0
        while not self.run.over.wait(_LOOK_SECONDS):
            looks = 0 if self.beats != beats else looks + 1
            beats = self.beats
            for text, code, notify in self._reasons(looks * _LOOK_SECONDS):
                if not self.run.over.is_set():
                    abort(text, code, notify)

    def _reasons(self, unanswered: float) -> Iterator[tuple[str, int, bool]]:
        """Yields the reasons to end this process, as arguments of `abort`.

        Args:
            unanswered: Seconds for which the service has not answered.
        """
        for text in self.ends.values():
            yield text, ABORTED_BY_ANOTHER, False
        stops = f"process {self.group.index} of {self.group.count} stops: "
        is_gone = self.relay is not None and self.relay.gone.is_set()
        is_gone = is_gone or self.error is not None
        if is_gone or unanswered > self.heartbeat_timeout:
            state = "is gone" if is_gone else "is not responding"
            text = f"the first process, which coordinates the run, {state}"
            yield stops + text, ABORTED_BY_ANOTHER, False
        for other, beats in self.silent_beats.items():
            if beats * BEAT_SECONDS > self.heartbeat_timeout and other not in self.left:
                text = f"process {other} is not responding"
                yield stops + text, ABORTED_BY_ANOTHER, True
        yield from self._reasons_to_stop_waiting(stops)

    def _reasons_to_stop_waiting(self, stops: str) -> Iterator[tuple[str, int, bool]]:
        waits = self.run.waits_for()
        if waits is None:
            return
        name, since = waits
        seconds = time.monotonic() - since
        in_section = self.run.waiting_since is not None
        for other, count in self.left.items():
            if seconds > 2 * BEAT_SECONDS and int(count) < self.run.section_count + (
                not in_section
            ):
                text = (
                    f"process {other} has ended, while this one waits for it in {name}"
                )
                yield stops + text, ABORTED_BY_ANOTHER, True
        if in_section and seconds > self.step_timeout:
            late = ", ".join(f"process {i}" for i in self._late()) or "no process"
            text = (
                f"process {self.group.index} of {self.group.count} has waited "
                f"{self.step_timeout:g} s in {name}; {late} has not come there"
            )
            yield text, 1, True

    def _late(self) -> list[int]:
        """The processes that have not come to this process's section."""
        return [
            i
            for i in range(self.group.count)
            if int(self.progress.get(str(i), "0").split()[0]) < self.run.section_count
        ]


def abort_all_and_exit(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A `sys.excepthook` that also terminates the other processes."""
    traceback.print_exception(kind, error, trace)
    message = "".join(traceback.format_exception_only(kind, error)).strip()
    run = run_state()
    unresponsive = _unresponsive(run) if run.collective_failed else ""
    if unresponsive:
        index, count = run.group.index, run.group.count
        text = f"process {index} of {count} stops: {unresponsive}{message}"
        abort(text, ABORTED_BY_ANOTHER, notify=True)
    abort_all(message)


def _unresponsive(run: RunState) -> str:
    """The processes that no longer report their progress, for a message."""
    try:
        before = run.group.list("progress")
        time.sleep(6 * BEAT_SECONDS)
        after = run.group.list("progress")
    except Exception:  # jaxlib has no narrower class for it
        return "the first process, which coordinates the run, is gone; "
    unchanged = [i for i, text in sorted(after.items()) if text == before.get(i)]
    return "".join(f"process {i} is not responding; " for i in unchanged)


def abort_all(message: str) -> None:
    """Ends all processes of the run, this one at once; each prints `message`."""
    group = run_state().group
    text = f"process {group.index} of {group.count} failed: {message}"
    abort(text, 1, notify=True)


def abort(text: str, code: int, notify: bool) -> None:
    """Prints `text` and ends this process.

    The first process, which carries the messages, ends only once all know the reason.

    Args:
        text: The reason.
        code: The exit code.
        notify: Whether the other processes get the reason from this one.
    """
    run = run_state()
    group = run.group
    run.ending.acquire()  # a second thread waits here for the end of the process
    run.over.set()
    print(f"gshard_tf: {text}", file=sys.stderr, flush=True)

    def notify_others() -> None:
        with contextlib.suppress(Exception):  # the service may be gone with its process
            if notify:
                group.put(f"end/{group.index}", text)
            group.put(f"heard/{group.index}", "")
            while group.is_chief and len(group.list("heard")) < group.count:
                time.sleep(0.1)

    # A service whose process hangs does not answer.
    notifying = threading.Thread(target=notify_others, daemon=True)
    notifying.start()
    notifying.join(_SHUTDOWN_GRACE_SECONDS if group.is_chief else 2 * BEAT_SECONDS)
    # Without jax's own shutdown, which would wait for processes that are gone.
    os._exit(code)
