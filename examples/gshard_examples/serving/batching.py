"""Requests that come at the same time are answered by one call of the model."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any


class OverloadedError(RuntimeError):
    """More is waiting than may wait."""


class Batcher:
    """Collects items for a moment and hands them to a function, one call at a time.

    Args:
        run: Takes a list of items and returns as many results; runs in a thread of
            its own.
        max_batch: The most items of a call.
        wait: Seconds for which the first of a batch waits for others.
        max_waiting: The most items that may wait; more are refused at once.
        on_batch: Told the size of each call and its seconds.

    Raises:
        ValueError: when a batch could hold nothing, or nothing could wait.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        max_batch: int = 32,
        wait: float = 0.005,
        max_waiting: int = 256,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more. Received: {name}={value}")
        self.run = run
        self.max_batch = max_batch
        self.wait = wait
        self.max_waiting = max_waiting
        self.on_batch = on_batch
        self._waiting: collections.deque[tuple[Any, asyncio.Future]] = (
            collections.deque()
        )
        self._arrived = asyncio.Event()
        self._busy_since: float | None = None
        self._worker: asyncio.Task | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """Works for as long as this is entered."""
        with concurrent.futures.ThreadPoolExecutor(1, "model") as thread:
            self._worker = asyncio.create_task(self._work(thread))
            try:
                yield self
            finally:
                self._worker.cancel()
                for _, future in self._waiting:
                    future.cancel()

    @property
    def waiting(self) -> int:
        """Items that wait now."""
        return len(self._waiting)

    def is_healthy(self, patience: float) -> bool:
        """Returns whether the worker runs, with no call longer than `patience`."""
        if self._worker is None or self._worker.done():
            return False
        return self._busy_since is None or (
            time.monotonic() - self._busy_since < patience
        )

    async def submit(self, items: Sequence[Any]) -> list[Any]:
        """The results of these items.

        Raises:
            OverloadedError: when too many would be waiting.
            Exception: what `run` raised.
        """
        if len(self._waiting) + len(items) > self.max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} texts are waiting, {self.max_waiting} may"
            )
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        self._arrived.set()
        try:
            return await asyncio.gather(*futures)
        finally:
            # Whoever stopped waiting left some of them behind: they are not computed,
            # and take no room of those that wait.
            for future in futures:
                future.cancel()  # gather may have done so
            if any(future.cancelled() for future in futures):
                self._waiting = collections.deque(
                    (item, future)
                    for item, future in self._waiting
                    if not future.done()
                )

    async def _work(self, thread: concurrent.futures.Executor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self.max_batch:
                await asyncio.sleep(self.wait)
            batch: list[tuple[Any, asyncio.Future]] = []
            while self._waiting and len(batch) < self.max_batch:
                item, future = self._waiting.popleft()
                if not future.done():
                    batch.append((item, future))
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            self._busy_since = start = time.monotonic()
            try:
                results = await loop.run_in_executor(
                    thread, self.run, [item for item, _ in batch]
                )
            except Exception as error:  # noqa: BLE001 - told to those who asked
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
            self._busy_since = None
            self.on_batch(len(batch), time.monotonic() - start)
