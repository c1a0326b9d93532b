"""A trained translator behind the example server: many clients for some minutes.

    python -m benchmarks.serving RUN DATA [--minutes 5] [--clients 16] [--json]

RUN is a folder of `gshard-translate train`, DATA its prepared corpus. The model is
exported, served by `python -m gshard_examples.serving` on a free port of loopback, and
asked by clients without pause, 1 to 4 texts of the test split a request. Every
translation is compared with the trained model's own. Resident memory of the server is
read six times a minute; what it is after the first and after the last fifth of the time
says whether it grows.
"""

import collections
import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)

#: Texts of the test split to choose from.
TEXTS = 120
#: Seconds that a client, and the start of the server, may take.
PATIENCE = 120.0

Texts = list[tuple[str, str, str]]  # tag, source, the trained model's translation


def export(run: Path, data: Path, folder: Path) -> Texts:
    """Writes the SavedModel, and says what the trained model makes of some texts."""
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.export import export
    from gshard_examples.translation.train import load_model, sample_pairs
    from gshard_examples.translation.translator import Translator

    _, vocabulary, model = load_model(run)
    translator = Translator(model, vocabulary)
    export(translator, folder)
    pairs = sample_pairs(load_corpus(data), "test", TEXTS)
    tags, sources = [p.lang for p in pairs], [p.source for p in pairs]
    return list(zip(tags, sources, translator.translate(tags, sources), strict=True))


def ask(connection: http.client.HTTPConnection, path: str, body: Any = None) -> bytes:
    """The body of an answer of 200; RuntimeError for another one."""
    method = "GET" if body is None else "POST"
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer[:200]!r}")
    return answer


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of a server that has started; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gshard_examples.serving", str(folder)]
    command += ["--port", str(port)]
    process = subprocess.Popen(command, stdout=sys.stderr)  # noqa: S603
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                ask(connect(port), "/healthz")
                break
            except (OSError, RuntimeError):
                if process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


def connect(port: int) -> http.client.HTTPConnection:
    """A connection to the server, which opens with the first request."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


def resident(port: int) -> float:
    """MiB of the server's process."""
    text = ask(connect(port), "/metrics").decode()
    size = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
    return float(size.group(1)) / 2**20


class Clients:
    """Threads that ask without pause, and what became of their requests."""

    def __init__(self, port: int, texts: Texts, seconds: float):
        self.port, self.texts = port, texts
        self.end = time.monotonic() + seconds
        self.latencies: list[float] = []
        self.translations = self.wrong = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def run(self, count: int) -> list[float]:
        """Resident memory of the server, while so many clients ask."""
        threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < self.end:
            memory.append(resident(self.port))
            time.sleep(max(0.1, min(10.0, self.end - time.monotonic())))
        for thread in threads:
            thread.join()
        return [*memory, resident(self.port)]

    def _ask(self, seed: int) -> None:
        choose, connection = random.Random(seed), connect(self.port)  # noqa: S311
        while time.monotonic() < self.end:
            some = choose.sample(self.texts, choose.choice([1, 1, 1, 2, 4]))
            tags, sources, expected = zip(*some, strict=True)
            start = time.perf_counter()
            try:
                body = {"texts": sources, "languages": tags}
                output = json.loads(ask(connection, "/translate", body))["translations"]
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                with self._lock:
                    self.errors[str(error)] += 1
                connection = connect(self.port)
                continue
            with self._lock:
                self.latencies.append(time.perf_counter() - start)
                self.translations += len(output)
                pairs = zip(output, expected, strict=True)
                self.wrong += sum(one["text"] != other for one, other in pairs)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("data", type=Path, help="folder of its corpus")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        texts = export(options.run, options.data, Path(folder, "saved_model"))
        say("exported")
        with server(Path(folder, "saved_model")) as port:
            say("started")
            clients = Clients(port, texts, 60 * options.minutes)
            memory = clients.run(options.clients)
    if not clients.latencies:
        raise RuntimeError(f"Nothing was answered. Received: {dict(clients.errors)}")
    p50, p99 = np.percentile(clients.latencies, [50, 99])
    fifth = len(memory) // 5
    result = {
        "requests": len(clients.latencies),
        "translations": clients.translations,
        "other than the trained model's": clients.wrong,
        "errors": dict(clients.errors),
        "p50": p50,
        "p99": p99,
        "translations_per_second": clients.translations / 60 / options.minutes,
        "resident MiB after a fifth": memory[fifth],
        "resident MiB at the end": memory[-1],
        "resident MiB": [round(size) for size in memory],
        **circumstances(start, quick=False),
    }
    show(result, options.json)


if __name__ == "__main__":
    main()
