"""Progress of a training run: a line for each validation, and a moving one.

On a terminal the moving line has the step, the loss, tokens per second and the minutes
left. Elsewhere there is a line per validation, and no control character. All figures,
those of the routers too, are in `history.csv`, in TensorBoard's `logs/` and in
`train.log`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

#: Steps whose median duration says how long the others will take.
WINDOW = 50
#: Seconds between two looks at the loss, which has to come from the devices.
REFRESH = 0.5
COLUMNS = ("   step", "train loss", "dev loss", "accuracy", "  tokens/s", "min left")


def make_console() -> Console:
    """The console of standard output: only text where that is no terminal."""
    return Console(highlight=False, markup=False, emoji=False)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends what `gshard_examples` and `gshard_tf` log to a file meanwhile."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    loggers = [logging.getLogger(name) for name in ("gshard_examples", "gshard_tf")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


class Pace:
    """Durations of steps and validations, and so of the rest of a run.

    Args:
        steps: Steps of the run.
        steps_per_epoch: Steps between validations.
        clock: Returns seconds.
    """

    def __init__(
        self,
        steps: int,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._between = 0.0
        self._last: float | None = None

    def epoch_begins(self) -> None:
        now = self._clock()
        if self._last is not None:
            self._between = now - self._last
        self._last = now

    def step_ends(self) -> None:
        now = self._clock()
        if self._last is not None:
            self._durations.append(now - self._last)
        self._last = now

    @property
    def step_seconds(self) -> float | None:
        """The median of the last steps: a few of them hold a compilation."""
        return statistics.median(self._durations) if self._durations else None

    def minutes_left(self, done: int) -> float | None:
        """Minutes to the end of the run, of which `done` steps are done."""
        seconds = self.step_seconds
        if seconds is None:
            return None
        validations = -(-(self.steps - done) // self.steps_per_epoch)
        return ((self.steps - done) * seconds + validations * self._between) / 60


class TrainingProgress(keras.callbacks.Callback):
    """Prints the progress of `fit`; enter it around `fit`, which may raise.

    Args:
        console: Where to print.
        steps: Steps of the run.
        steps_per_epoch: Steps between validations.
        tokens_per_step: Source and target tokens of a batch, on average; padding is
            none.
        after: Called with the number of steps done after each validation's line.
    """

    def __init__(
        self,
        console: Console,
        steps: int,
        steps_per_epoch: int,
        tokens_per_step: float,
        after: Callable[[int], None] | None = None,
    ):
        super().__init__()
        self._console = console
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._tokens_per_step = tokens_per_step
        self._after = after
        self._pace = Pace(steps, steps_per_epoch)
        self._live: Live | None = None
        self._done = 0
        self._loss: float | None = None
        self._shown = 0.0

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._console.print("  ".join(COLUMNS), soft_wrap=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._pace.epoch_begins()
        # A run that was stopped within an epoch goes on there.
        self._done = int(self.model.optimizer.iterations)
        self._show("compiling" if self._pace.step_seconds is None else "training")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._pace.step_ends()
        self._done += 1
        now = time.perf_counter()
        if self._live is not None and now - self._shown > REFRESH:
            self._shown = now
            self._loss = float((logs or {}).get("nll", float("nan")))
            self._show("training")

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._show("validating")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = logs or {}
        self._done = int(self.model.optimizer.iterations)
        cells = [
            f"{self._done:,}",
            *(_number(logs.get(name)) for name in ("nll", "val_nll")),
            _percent(logs.get("val_token_accuracy")),
            _number(self._tokens_per_second(), ",.0f"),
            _number(self._pace.minutes_left(self._done), ".1f"),
        ]
        widths = map(len, COLUMNS)
        self._console.print("  ".join(map(str.rjust, cells, widths)), soft_wrap=True)
        figures = ", ".join(f"{name} {value:.5g}" for name, value in logs.items())
        log.info("step %d: %s", self._done, figures)
        if self._after is not None:
            self._after(self._done)
        self._show("saving")

    def _tokens_per_second(self) -> float | None:
        seconds = self._pace.step_seconds
        return None if not seconds else self._tokens_per_step / seconds

    def _show(self, doing: str) -> None:
        if self._live is None:
            return
        # 80 columns hold all of it.
        parts = [f"{self._done:,}/{self._steps:,} {doing}"]
        for text, value in (
            (f"loss {_number(self._loss)}", self._loss),
            (
                f"{_number(self._tokens_per_second(), ',.0f')} tokens/s",
                self._tokens_per_second(),
            ),
            (
                f"{_number(self._pace.minutes_left(self._done), '.1f')} min left",
                self._pace.minutes_left(self._done),
            ),
        ):
            if value is not None:
                parts.append(text)
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(self._steps, self._done, width=10)
        figures = Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")
        line.add_row(bar, figures)
        self._live.update(line, refresh=True)


def _number(value: Any, spec: str = ".3f") -> str:
    return "-" if value is None else format(float(value), spec)


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * float(value):.1f} %"


def print_samples(console: Console, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Prints sources, what the model makes of them, and what they mean.

    Args:
        console: Where to print.
        rows: Language, source, translation and reference of each.
    """
    for language, *texts in rows:
        names = (f"{language:>9}", "model", "reference")
        for name, text in zip(names, texts, strict=True):
            # No control characters, whatever a model says.
            shown = "".join(c if c.isprintable() else " " for c in text)
            line = Text(
                f"{name:>11}  {shown}".rstrip(), no_wrap=True, overflow="ellipsis"
            )
            line.truncate(console.width, overflow="ellipsis")
            console.print(line)
