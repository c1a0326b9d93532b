"""benchmarks.serving: that its clients count what is wrong."""

import http.server
import json
import threading

import pytest

from benchmarks.serving import Clients

TEXTS = [("de", "Baum", "tree"), ("de", "Haus", "house"), ("de", "kaputt", "broken")]
TEXTS += [("de", "falsch", "wrong")]


class Answers(http.server.BaseHTTPRequestHandler):
    """Knows two words, makes a mistake with one and fails at another."""

    protocol_version = "HTTP/1.1"

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(200, b"process_resident_memory_bytes 3145728.0\n")

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        texts = json.loads(self.rfile.read(length))["texts"]
        known = {"Baum": "tree", "Haus": "house", "falsch": "?"}
        if "kaputt" in texts:
            return self.reply(500, b"out of order")
        found = [{"text": known[text]} for text in texts]
        return self.reply(200, json.dumps({"translations": found}).encode())

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("texts", "wrong", "errors"),
    [(TEXTS[:2] * 2, False, False), (TEXTS, True, True)],
)
def test_what_is_wrong_is_counted(port, texts, wrong, errors):
    clients = Clients(port, texts, seconds=0.5)
    memory = clients.run(4)
    assert set(memory) == {3.0} and len(memory) >= 2
    assert clients.translations >= len(clients.latencies) > 0
    assert bool(clients.wrong) == wrong
    assert bool(clients.errors) == errors
    if errors:
        assert set(clients.errors) == {"status 500: b'out of order'"}
