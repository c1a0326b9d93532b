"""Watches a worker: gives it cases, and a successor when it dies or hangs."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLAG = "--xla_backend_optimization_level="


class Crew:
    """One worker at a time.

    Args:
        patience: Seconds after which a case is given up as hanging.
        lifetime: Cases after which a worker is replaced: programs pile up in it.
        preload: Python code that the worker runs first; for planting faults.
    """

    def __init__(
        self, patience: float = 240.0, lifetime: int = 150, preload: str | None = None
    ):
        self.patience = patience
        self.lifetime = lifetime
        self.preload = preload
        self._worker: subprocess.Popen | None = None
        self._events: queue.Queue = queue.Queue()
        self._cases = 0

    def run(self, seed: int, name: str, shrink: bool = False) -> dict[str, Any]:
        """Runs a case; returns `verdict`, `said` and `script`."""
        if self._worker is None or self._cases >= self.lifetime:
            self._start()
        self._cases += 1
        job = {"seed": seed, "name": name, "shrink": shrink}
        outcome: dict[str, Any] = {"seed": seed, "name": name, "script": None}
        try:
            print(json.dumps(job), file=self._worker.stdin, flush=True)
        except BrokenPipeError:
            pass  # its death is read below
        while True:
            try:
                event = self._events.get(timeout=self.patience)
            except queue.Empty:
                self.close()
                return outcome | self._gone(
                    outcome, f"no answer in {self.patience:.0f} s"
                )
            if event is None:
                status = self._worker.wait()
                self.close()
                return outcome | self._gone(outcome, f"the process ended with {status}")
            outcome |= event
            if event["event"] == "end":
                return outcome

    def _gone(self, outcome: dict[str, Any], said: str) -> dict[str, str]:
        if "verdict" in outcome:
            return {}  # a smaller form of it ended the process: the case itself did not
        if outcome["script"] is None:
            # TensorFlow alone did not survive it.
            return {"verdict": "unusable", "said": said}
        return {"verdict": "crashed", "said": said}

    def _start(self) -> None:
        self.close()
        flags = os.environ.get("XLA_FLAGS", "").split()
        # Faults show, or not, as the compiler optimizes for users.
        flags = [flag for flag in flags if not flag.startswith(FLAG)]
        environ = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_PLATFORMS": "cpu",
        }
        module = "benchmarks.fuzz.worker"
        code = f"from {module} import main; main()"
        if self.preload:
            code = f"{self.preload}\n{code}"
        self._worker = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._cases = 0
        self._events = queue.Queue()
        threading.Thread(
            target=_listen, args=(self._worker, self._events), daemon=True
        ).start()
        # ("ready", or None if it does not start.)
        if self._events.get(timeout=600) is None:
            raise RuntimeError(f"The worker does not start. Run: {module}")

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None


def _listen(worker: subprocess.Popen, events: queue.Queue) -> None:
    for line in worker.stdout:
        events.put(json.loads(line))
    events.put(None)
