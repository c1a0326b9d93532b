"""A served model that needs no TensorFlow, and clients that ask it."""

import contextlib
import http.client
import json
import os
import socket
import tempfile
import threading
import time

import uvicorn
from forks import Fork
from processes import PYTHONPATH

from gshard_examples.serving.requests import Limits


class Echo:
    """A model that is quick, or as slow as wanted, or broken."""

    languages = ["de", "fr", "sr_Latn"]

    def __init__(self):
        self.batches = []
        self.seconds = 0.0

    def translate(self, items):
        self.batches.append(len(items))
        time.sleep(self.seconds)
        if any(text == b"break" for text, _, _ in items):
            raise RuntimeError("broken on purpose")
        return [
            {
                "text": f"{tag.decode()}: {text[:20].decode('utf-8', 'replace')}",
                "score": -1.0,
                "truncated": cut,
                "unfinished": False,
                "n_best": [{"text": "<b>one</b>", "score": -1.0}],
            }
            for text, tag, cut in items
        ]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(app):
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


COMMAND = "import runpy; runpy.run_module('gshard_examples.serving', None, '__main__')"


class Served:
    """The command in a process of its own, which answers and has said where.

    Args:
        folder: A SavedModel.
        options: Of the command.

    Attributes:
        port: It listens there.
    """

    def __init__(self, folder, *options):
        self.port = free_port()
        self._printed = tempfile.TemporaryFile()
        self._errors = tempfile.TemporaryFile("w+")
        self._process = Fork(
            COMMAND,
            [folder, "--port", self.port, *options],
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
            cwd="/",
            stdout=self._printed,
            stderr=self._errors,
        )
        if not self._answers():
            _, errors = self.ended()
            raise AssertionError(errors)

    def _answers(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if call(self.port, "GET", "/healthz")[0] == 200:
                    printed = os.pread(self._printed.fileno(), 4096, 0)
                    return f"http://127.0.0.1:{self.port}\n".encode() in printed
            with contextlib.suppress(TimeoutError):
                self._process.wait(0.1)
                return False
        return False

    def send(self, number):
        """Sends it a signal."""
        os.kill(self._process.pid, number)

    def ended(self):
        """Waits for its end; returns its status and its errors."""
        try:
            status = self._process.wait(60)
        finally:
            self._process.kill()
        with self._printed, self._errors:
            self._errors.seek(0)
            return status, self._errors.read()


LIMITS = Limits(body_bytes=2_000_000, texts=8, text_characters=100, seconds=2.0)


def call(port, method, path, body=None, timeout=30):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask(port, texts, languages, **options):
    body = json.dumps({"texts": texts, "languages": languages}).encode()
    status, answer = call(port, "POST", "/translate", body, **options)
    return status, json.loads(answer)
