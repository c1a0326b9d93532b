"""Counts and times in Prometheus's format."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable, Iterator

import prometheus_client as prometheus


class Metrics:
    """The metrics of one server, and its process's memory and CPU time."""

    MEDIA_TYPE = prometheus.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "translate_requests", "Requests, by status", ["status"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "translate_request_seconds", "Time to answer", registry=registry
        )
        self._batch_size = prometheus.Histogram(
            "translate_batch_texts",
            "Texts translated together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self._batch_seconds = prometheus.Histogram(
            "translate_batch_seconds", "Time in the model", registry=registry
        )
        self._waiting = prometheus.Gauge(
            "translate_waiting_texts", "Texts that wait", registry=registry
        )

    def watch(self, waiting: Callable[[], int]) -> None:
        """Asks this whenever somebody asks how many wait."""
        self._waiting.set_function(waiting)

    def batch(self, size: int, seconds: float) -> None:
        """Counts one call of the model."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    @contextlib.contextmanager
    def request(self) -> Iterator[types.SimpleNamespace]:
        """Counts one request; the block sets the `status` of what it is given."""
        outcome = types.SimpleNamespace(status=499)  # cancelled, unless it is set
        start = time.perf_counter()
        try:
            yield outcome
        finally:
            self._requests.labels(outcome.status).inc()
            self._seconds.observe(time.perf_counter() - start)

    def text(self) -> bytes:
        """All of them."""
        return prometheus.generate_latest(self._registry)
