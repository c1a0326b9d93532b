"""Looks after the processes of a run: whether each of them is there, and goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gshard_tf.runtime.relay import Relay

if TYPE_CHECKING:
    from gshard_tf.runtime.process_group import _Run

# The exit code of a process that stopped because another one did.
STOPPED_BY_ANOTHER = 70
BEAT_SECONDS = 0.5
_LOOK_SECONDS = 0.25


class Watch:
    """Looks whether another process has ended, or holds this one up.

    One thread talks to the coordination service, which may not answer; another one
    looks at what it heard, and ends the process.
    """

    def __init__(
        self,
        run: _Run,
        relay: Relay | None,
        patience: float,
        heartbeat: float,
        end: Callable[[str, int, bool], None],
    ):
        """See `initialize`; `end` prints a text and ends the process by a code."""
        self.run = run
        self.group = run.group
        self.end = end
        self.relay = relay
        self.patience = patience
        self.heartbeat = heartbeat
        # What was heard last: of ends, of those that have left, and of progress.
        self.ends: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.progress: dict[str, str] = {}
        self.beats = 0
        self.error: Exception | None = None
        # How many beats ago each process told something new.
        self.silent: dict[str, int] = {}

    def start(self) -> None:
        """Tells the others that this process is there, and watches from now on."""
        self._beat()
        for target in (self._talk, self._look):
            threading.Thread(target=target, daemon=True).start()

    def part(self) -> None:
        """At this process's own end: leaves together with the others."""
        with contextlib.suppress(Exception):  # the service is gone: `_look` ends it
            self.group.tell(f"left/{self.group.index}", str(self.run.turn))
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
        processes, before = self.group, self.progress
        processes.tell(f"progress/{processes.index}", f"{self.run.turn} {self.beats}")
        self.ends = processes.overhear("end")
        self.left = processes.overhear("left")
        self.progress = processes.overhear("progress")
        for index, told in self.progress.items():
            same = told == before.get(index)
            self.silent[index] = self.silent.get(index, 0) + 1 if same else 0
        self.beats += 1

    def _look(self) -> None:
        # Beats and looks are counted, not seconds: nothing is silent while this
        # process is stopped, or Python is held up.
        looks, beats = 0, 0
        while not self.run.over.wait(_LOOK_SECONDS):
            looks = 0 if self.beats != beats else looks + 1
            beats = self.beats
            for text, code, tell in self._reasons(looks * _LOOK_SECONDS):
                if not self.run.over.is_set():
                    self.end(text, code, tell)

    def _reasons(self, unanswered: float) -> Iterator[tuple[str, int, bool]]:
        """Why this process has to end, if there is a reason: text, code, whether new.

        Args:
            unanswered: Seconds for which the service has not answered.
        """
        index, count = self.group.index, self.group.count
        for text in self.ends.values():
            yield text, STOPPED_BY_ANOTHER, False
        gone = self.relay is not None and self.relay.gone.is_set()
        if gone or self.error is not None or unanswered > self.heartbeat:
            how = "is gone" if gone or self.error else "gives no sign of life"
            yield (
                f"process {index} of {count} stops: the first process, which "
                f"coordinates the run, {how}",
                STOPPED_BY_ANOTHER,
                False,
            )
        for other, silent in self.silent.items():
            if silent * BEAT_SECONDS > self.heartbeat and other not in self.left:
                yield (
                    f"process {index} of {count} stops: process {other} gives no sign "
                    "of life",
                    STOPPED_BY_ANOTHER,
                    True,
                )
        waits = self.run.waits_for()
        if waits is None:
            return
        what, since = waits
        seconds = time.monotonic() - since
        for other, turn in self.left.items():
            if seconds > 2 * BEAT_SECONDS and int(turn) < self.run.turn + (
                self.run.waiting_since is None
            ):
                yield (
                    f"process {index} of {count} stops: process {other} has ended, "
                    f"while this one waits for it in {what}",
                    STOPPED_BY_ANOTHER,
                    True,
                )
        if self.run.waiting_since is not None and seconds > self.patience:
            behind = [
                i
                for i in range(count)
                if int(self.progress.get(str(i), "0").split()[0]) < self.run.turn
            ]
            who = ", ".join(f"process {i}" for i in behind) or "no process"
            yield (
                f"process {index} of {count} has waited {self.patience:g} s in "
                f"{what}; {who} has not come there",
                1,
                True,
            )
