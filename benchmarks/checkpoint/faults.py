"""Runs under `kill -9` at random moments, and with damaged checkpoints.

    python -m benchmarks.checkpoint.faults [--kills N] [--seed S] [--processes] [--json]

* kills: a small run is killed N times, half of them at a random moment of its life
  (start, restore, compilation and training), half while a checkpoint is written; each
  time it is started again. Every loss that was ever computed for a step, and the final
  state, must be those of a run that nobody killed, to the bit; a restart may not begin
  before the newest checkpoint that was announced as written.
* cases: a full disk, a read-only folder, a flipped byte, a disk that does not answer, a
  folder that is removed, ...: what a run says to each.
* processes, with `--processes`: SIGTERM to a run of one, two and four processes, to one
  of them or to all; see `benchmarks.checkpoint.fault_processes`.

Each life of the killed run is a fork of this process, which has loaded the modules and
started nothing.
"""

import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compile quickly: a life is mostly that.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The first life compiles for all of them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="faults-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from benchmarks.checkpoint import (
    fault_cases,
    fault_processes,
    faulty_run,
    folder_cases,
)
from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)


class Life:
    """One process of the run, and what it reports."""

    def __init__(self, folder: Path, epochs: int):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            code = 1
            try:
                end = faulty_run.run(
                    folder, epochs, lambda line: os.write(writing, f"{line}\n".encode())
                )
                os.write(writing, f"done {end}\n".encode())
                code = 0
            except BaseException as error:  # told to the parent
                os.write(writing, f"error {error!r}\n".replace("\\n", " ").encode())
            os._exit(code)
        os.close(writing)
        self.pipe = reading
        self.start = time.monotonic()
        self._rest = b""
        self.lines: list[str] = []

    def listen(self, until: float) -> str | None:
        """The next line before `until`; None when it is over or has ended."""
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                return None
            got = os.read(self.pipe, 1 << 16)
            if not got:
                return None
            self._rest += got
        line, self._rest = self._rest.split(b"\n", 1)
        self.lines.append(line.decode())
        return self.lines[-1]

    def end(self, kill: bool) -> int:
        """Kills it, or waits for it; returns how it ended."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        while self.listen(time.monotonic() + 1) is not None:
            pass
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(status)


def live(folder: Path, epochs: int) -> Life:
    """A life that nobody ends."""
    life = Life(folder, epochs)
    while life.listen(time.monotonic() + 600) is not None:
        pass
    life.end(kill=False)
    if not life.lines or not life.lines[-1].startswith("done"):
        raise RuntimeError(f"The run failed by itself: {life.lines[-3:]}")
    return life


def kill_one(folder: Path, epochs: int, rng: random.Random, pace: float) -> Life | None:
    """One life and its death; None when the run came to its end before.

    Args:
        pace: Seconds of training after which it is killed, on average.
    """
    life = Life(folder, epochs)
    where = rng.choice(["anywhere", "training", "saving", "saving"])
    # `anywhere`: from the fork on. Else from a first step, or the beginning of a save.
    limit = rng.uniform(0, 4.0) if where == "anywhere" else 600.0
    event, delay = None, 0.0
    if where == "training":
        event, delay = "step", rng.uniform(0, 2 * pace)
    elif where == "saving":
        event, delay = "saving", rng.uniform(0, 0.03)
        for _ in range(rng.randrange(3)):
            if _await(life, "saved", limit) is None:
                break
    if event is not None and _await(life, event, limit) is not None:
        limit = time.monotonic() + delay - life.start
    while life.listen(life.start + limit) is not None:
        if life.lines[-1].startswith(("done", "error")):
            break
    if life.lines and life.lines[-1].startswith(("done", "error")):
        life.end(kill=False)
        if life.lines[-1].startswith("error"):
            raise RuntimeError(f"A restart failed: {life.lines[-3:]}")
        return None
    life.end(kill=True)
    return life


def _await(life: Life, event: str, limit: float) -> str | None:
    while (line := life.listen(life.start + limit)) is not None:
        if line.startswith(event):
            return line
        if line.startswith(("done", "error")):
            return None
    return None


def phase(life: Life) -> str:
    """Returns the phase in which a life ended."""
    if not life.lines:
        return "starting"
    events = [line.split()[0] for line in life.lines]
    marks = [event for event in events if event in ("saving", "saved")]
    if marks and marks[-1] == "saving":
        return "saving"
    return "training" if "step" in events else "restored, compiling"


def newest(lines: list[str], event: str) -> int:
    steps = [int(x.split()[1]) for x in lines if x.split()[0] == event]
    return max(steps, default=0)


def losses(folder: Path) -> list[list[str]]:
    """Step and loss of every step that a run ever computed."""
    lines = (folder / "losses.txt").read_text().splitlines()
    return [line.split() for line in lines]


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills a run `count` times and compares it with one that nobody killed."""
    rng = random.Random(seed)  # noqa: S311
    # More steps than so many lives come to.
    epochs = max(2, count)
    start = time.monotonic()
    whole = live(folder / "whole", epochs)
    end = whole.lines[-1].split()[1]
    truth = dict(
        x.split() for x in (folder / "whole/losses.txt").read_text().split("\n") if x
    )
    say(f"a run of {len(truth)} steps: {time.monotonic() - start:.0f} s")
    run = folder / "killed"
    phases: Counter[str] = Counter()
    redone, written, last_step, start = [], 0, 0, time.monotonic()
    for i in range(count):
        life = kill_one(run, epochs, rng, pace=0.15)
        if life is None:
            say(f"the run came to its end after {i} kills")
            break
        phases[phase(life)] += 1
        if any(line.startswith("restored") for line in life.lines):
            restored = newest(life.lines, "restored")
            if restored < written:
                raise RuntimeError(
                    f"Kill {i}: step {written} was written, {restored} restored"
                )
            redone.append(last_step - restored)
        last_step = max(newest(life.lines, "step"), newest(life.lines, "restored"))
        written = max(written, newest(life.lines, "saved"))
        if i % 20 == 19:
            say(f"{i + 1} kills, step {last_step}, {time.monotonic() - start:.0f} s")
    last = live(run, epochs)
    lines = losses(run)
    wrong = [step for step, loss in lines if truth.get(step) != loss]
    return {
        "kills": sum(phases.values()),
        "while": dict(phases),
        "steps": len(truth),
        "steps_computed": len(lines),
        "steps_redone_per_restart_most": max(redone, default=0),
        "losses_that_differ": len(wrong),
        "final_state_equal": last.lines[-1].split()[1] == end,
        "left_over": sorted(
            path.name
            for path in (run / "checkpoints").iterdir()
            if path.name.startswith(".") and path.name != ".lock"
        ),
        "seconds_per_life": (time.monotonic() - start) / (sum(phases.values()) + 1),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how often (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument(
        "--processes", action="store_true", help="SIGTERM to one process and to several"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        result: dict[str, Any] = {"kills": kills(options.kills, options.seed, folder)}
        cases = fault_cases.CASES | folder_cases.CASES
        result["cases"] = {
            name: fault_cases.try_case(name, case, folder)
            for name, case in cases.items()
        }
        if options.processes:
            result["processes"] = fault_processes.sigterm(
                folder / "processes", options.seed
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    show(result | circumstances(start, options.kills < 200), options.json)


if __name__ == "__main__":
    main()
