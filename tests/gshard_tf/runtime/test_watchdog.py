"""The reasons for which a watchdog ends its process, from what it has heard."""

import threading
import time

import pytest

from gshard_tf.runtime.process_group import ProcessGroup, RunState
from gshard_tf.runtime.watchdog import ABORTED_BY_ANOTHER, BEAT_SECONDS, Watchdog


class Store:
    """A coordination service of this process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, text, allow_overwrite):
        self.values[key] = text

    def key_value_dir_get(self, prefix):
        return [kv for kv in self.values.items() if kv[0].startswith(prefix)]


@pytest.fixture
def watchdog():
    run = RunState()
    run.group = ProcessGroup(0, 2, Store())
    return Watchdog(run, None, step_timeout=5, heartbeat_timeout=1)


def reasons(watchdog, unanswered=0.0):
    return list(watchdog._reasons(unanswered))


def other(watchdog, key, text):
    ProcessGroup(1, 2, watchdog.group.client).put(f"{key}/1", text)


def test_a_run_without_trouble_has_none(watchdog):
    other(watchdog, "progress", "0 0")
    watchdog._beat()
    assert reasons(watchdog) == []


def test_a_reason_of_another_process_is_repeated_and_not_sent_again(watchdog):
    other(watchdog, "end", "process 1 of 2 failed: a disk is full")
    watchdog._beat()
    text = "process 1 of 2 failed: a disk is full"
    assert reasons(watchdog) == [(text, ABORTED_BY_ANOTHER, False)]


def test_a_process_whose_progress_stands_still(watchdog):
    other(watchdog, "progress", "3 7")
    for _ in range(int(1 / BEAT_SECONDS) + 2):
        assert reasons(watchdog) == []
        watchdog._beat()
    [(text, code, notify)] = reasons(watchdog)
    assert text == "process 0 of 2 stops: process 1 is not responding"
    assert (code, notify) == (ABORTED_BY_ANOTHER, True)
    # One that has left is not expected to respond.
    other(watchdog, "left", "3")
    watchdog._beat()
    assert reasons(watchdog) == []


def test_the_first_process_is_gone_or_does_not_answer(watchdog):
    [(text, code, _)] = reasons(watchdog, unanswered=2.0)
    assert "coordinates the run, is not responding" in text
    assert code == ABORTED_BY_ANOTHER
    watchdog.error = RuntimeError("connection refused")
    [(text, _, _)] = reasons(watchdog)
    assert "coordinates the run, is gone" in text


def test_a_section_that_another_process_does_not_enter(watchdog):
    watchdog.run.section, watchdog.run.section_count = "step 4 of fit", 4
    watchdog.run.waiting_since = time.monotonic() - 6
    watchdog.progress = {"0": "4 1", "1": "3 1"}
    [(text, code, notify)] = reasons(watchdog)
    assert text == (
        "process 0 of 2 has waited 5 s in step 4 of fit; process 1 has not come there"
    )
    assert (code, notify) == (1, True)


def test_a_section_that_another_process_never_enters(watchdog):
    watchdog.run.section, watchdog.run.section_count = "step 4 of fit", 4
    watchdog.run.waiting_since = time.monotonic() - 2
    watchdog.left = {"1": "4"}
    assert reasons(watchdog) == []  # it left after this section
    watchdog.left = {"1": "3"}
    [(text, _, _)] = reasons(watchdog)
    assert text.endswith(
        "process 1 has ended, while this one waits for it in step 4 of fit"
    )


def test_processes_leave_together(watchdog):
    watchdog._beat()
    leaving = threading.Thread(target=watchdog.leave, daemon=True)
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive() and not watchdog.run.over.is_set()
    other(watchdog, "left", "0")
    watchdog._beat()
    leaving.join(10)
    assert watchdog.run.over.is_set()
