"""Options of the server, clients that disconnect, and requests of every kind."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import socket
import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn")

import tensorflow as tf  # noqa: E402
from serving_clients import LIMITS, Echo, Served, ask, call, free_port, serving  # noqa: E402

from gshard_examples.serving.__main__ import main  # noqa: E402
from gshard_examples.serving.app import make_app  # noqa: E402
from gshard_examples.serving.batching import Batcher  # noqa: E402
from gshard_examples.serving.requests import Limits  # noqa: E402

STRINGS = tf.TensorSpec([None], tf.string)


class Tiny(tf.Module):
    """The least that has the signatures: it says every text again, after a moment."""

    def __init__(self, milliseconds=0):
        super().__init__()
        self.factor = tf.Variable(1.0)
        self.milliseconds = milliseconds

    @tf.function(input_signature=[STRINGS, STRINGS])
    def translate(self, texts, languages):
        turns = tf.constant(0)
        until = tf.timestamp() + self.milliseconds / 1000.0
        while tf.timestamp() < until:
            turns += 1
        scores = self.factor * tf.zeros(tf.shape(texts))
        never = tf.fill(tf.shape(texts), turns < 0)
        return {
            "translations": texts + " " + languages,
            "scores": scores,
            "truncated": never,
            "unfinished": never,
            "n_best": texts[:, None],
            "n_best_scores": scores[:, None],
        }

    @tf.function(input_signature=[])
    def languages(self):
        return {"languages": tf.constant(["de", "fr"])}


def saved(folder, module=None, **signatures):
    module = module or Tiny()
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    module = Tiny(milliseconds=700)
    return saved(
        tmp_path_factory.mktemp("serving") / "model",
        module,
        translate=module.translate,
        languages=module.languages,
    )


def refused(arguments, capsys):
    """Returns the command's message; its status is 2, and it does not listen."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert (
        said.startswith("python -m gshard_examples.serving: ") and said.count("\n") == 1
    )
    return said


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--max-batch", "0", "a whole number of 1 or more. Received: '0'"),
        ("--max-batch", "-1", "a whole number of 1 or more. Received: '-1'"),
        ("--max-batch", "many", "a whole number of 1 or more. Received: 'many'"),
        ("--max-batch", "257", "--max-waiting 256.*Received: 257"),
        ("--max-waiting", "0", "a whole number of 1 or more. Received: '0'"),
        ("--max-waiting", "31", "at least 32, .* Received: 31"),
        ("--timeout", "0", "seconds above 0. Received: '0'"),
        ("--timeout", "nan", "seconds above 0. Received: 'nan'"),
        ("--timeout", "inf", "seconds above 0. Received: 'inf'"),
        ("--port", "99999", "1 to 65535. Received: '99999'"),
        ("--port", "0", "1 to 65535. Received: '0'"),
        ("--port", "http", "1 to 65535. Received: 'http'"),
        ("--host", "no host", "cannot listen on host 'no host', port 8000"),
        ("--host", "a" * 70, "cannot listen on host 'aaa"),
        ("--max-batches", "3", "unrecognized arguments: --max-batches=3"),
    ],
)
def test_an_option_that_cannot_be_used_is_a_sentence(flag, value, says, capsys):
    assert re.search(says, refused(["folder", f"{flag}={value}"], capsys))


def test_numbers_that_would_hang_the_server_are_refused_in_code_too():
    for name in ("max_batch", "max_waiting"):
        with pytest.raises(ValueError, match=f"1 or more. Received: {name}=0"):
            Batcher(list, **{name: 0})
    with pytest.raises(ValueError, match="Received: max_waiting=7"):
        make_app(Echo(), LIMITS, max_waiting=7)
    with pytest.raises(ValueError, match="above 0. Received: seconds=nan"):
        Limits(seconds=float("nan"))


def test_a_port_that_is_taken_is_a_sentence(good, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused([good, "--port", port], capsys)
    assert f"port {port}" in said and "in use" in said


def without_a_file(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def cut(name, part):
    def damage(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])

    return damage


DATA, INDEX = "variables/variables.data-00000-of-00001", "variables/variables.index"
DAMAGES = {
    "none": shutil.rmtree,
    "no graph": without_a_file("saved_model.pb"),
    "empty graph": cut("saved_model.pb", 0),
    "half a graph": cut("saved_model.pb", 0.5),
    "most of a graph": cut("saved_model.pb", 0.99),
    "no weights": without_a_file(DATA),
    "half the weights": cut(DATA, 0.5),
    "no index": without_a_file(INDEX),
    "half the index": cut(INDEX, 0.5),
    "another file": lambda folder: (folder / "saved_model.pb").write_bytes(b"a" * 99),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_a_sentence(good, tmp_path, damage, capsys):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    DAMAGES[damage](folder)
    said = refused([folder, "--port", free_port()], capsys)
    assert "no model to serve" in said and repr(str(folder)) in said


def test_a_model_that_is_no_translator_is_a_sentence(tmp_path, capsys):
    module = Tiny()
    folder = saved(tmp_path / "no_translate", module, languages=module.languages)
    said = refused([folder, "--port", free_port()], capsys)
    assert "must have the signature 'translate'" in said and "['languages']" in said
    folder = saved(
        tmp_path / "others",
        module,
        translate=module.languages,
        languages=module.languages,
    )
    said = refused([folder, "--port", free_port()], capsys)
    assert "must take ['languages', 'texts']" in said and "it takes []" in said


def counted(port, status):
    metrics = call(port, "GET", "/metrics")[1].decode()
    found = re.findall(rf'translate_requests_total{{status="{status}"}} (\S+)', metrics)
    return int(float(found[0])) if found else 0


def post(body, headers=b""):
    length = str(len(body)).encode()
    return (
        b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: "
        + length
        + b"\r\n"
        + headers
        + b"\r\n"
        + body
    )


def test_work_for_clients_that_have_gone_is_dropped():
    model = Echo()
    model.seconds = 0.5
    gone = 6
    limits = dataclasses.replace(LIMITS, seconds=30.0)
    with serving(make_app(model, limits, max_batch=2, max_waiting=8)) as port:
        body = json.dumps({"texts": ["a"], "languages": ["de"]}).encode()
        with socket.create_connection(("127.0.0.1", port)) as first:
            first.sendall(post(body))
            time.sleep(0.2)  # the model is at it
            for _ in range(gone):
                with socket.create_connection(("127.0.0.1", port)) as client:
                    client.sendall(post(body))
                    time.sleep(0.02)
            time.sleep(0.1)
            # They are out of those that wait, too: there is room for eight.
            assert ask(port, ["b"] * 8, ["de"] * 8)[0] == 200
            assert b" 200 " in first.recv(100)
        assert model.batches == [1, 2, 2, 2, 2]
        assert counted(port, 499) == gone
        assert counted(port, 200) == 2


def test_a_body_that_is_too_large_closes_the_connection():
    with serving(make_app(Echo(), LIMITS, max_waiting=16)) as port:
        for head in (
            b"Content-Length: 3000000\r\n\r\n",
            b"Content-Length: 3000000\r\nExpect: 100-continue\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(b"POST /translate HTTP/1.1\r\nHost: a\r\n" + head)
                chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
                sent, ended = 0, False
                begun = time.monotonic()
                # A client that would never stop.
                while b"chunked" in head and time.monotonic() - begun < 8:
                    try:
                        client.sendall(chunk)
                    except OSError:
                        ended = True
                        break
                    sent += len(chunk)
                assert ended == (b"chunked" in head)
                assert sent < 20_000_000  # and what buffers of the system hold
                if not sent:
                    answer = b""
                    while part := client.recv(4096):
                        answer += part
                    assert answer.startswith(b"HTTP/1.1 413 "), answer
                    assert b"connection: close\r\n" in answer.lower()
                    assert b"at most 2000000 bytes" in answer
        # One that stops after its answer has read it, whatever it sent.
        status, answer = call(port, "POST", "/translate", b"a" * 3_000_000)
        assert status == 413 and b"at most 2000000 bytes" in answer
        assert counted(port, 413) == 4


def test_a_body_where_none_is_read_closes_the_connection():
    with (
        serving(make_app(Echo(), LIMITS, max_waiting=16)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        client.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n"
        )
        answer = b""
        while part := client.recv(4096):
            answer += part
        assert b" 200 " in answer and b"connection: close" in answer.lower()


def test_sigterm_answers_what_is_in_flight_and_ends_with_0(good):
    server = Served(good, "--max-batch", "2")
    try:
        body = json.dumps({"texts": ["a"] * 6, "languages": ["de"] * 6}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
            client.sendall(post(body))
            time.sleep(0.3)
            server.send(signal.SIGTERM)
            answer = b""
            while part := client.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b'"a de"') == 6
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            server.send(signal.SIGTERM)
        status, errors = server.ended()
    assert status == 0 and "Traceback" not in errors, errors


# ---------------------------------------------------------------- requests of any kind

GOOD = json.dumps({"texts": ["a"], "languages": ["de"]}).encode()
PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"HEAD /page.js HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%2e%2e/app.py HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%ff%00?%zz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://b/languages HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /translate HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"Host: b\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: -3\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n",
        b"Content-Type: a/b; charset=\xff\r\n",
        b"Connection: close\r\n",
        b"A: " + b"b" * 70_000 + b"\r\n",
        b" folded\r\n",
        b": \r\n",
        b"\r\n",
        b"3\r\nabc\r\n",
        b"-1\r\n",
        b"0\r\n\r\n",
        GOOD,
        post(GOOD),
        post(GOOD[:-9]),
        post(b"\xff\xfe"),
        post(b"[" * 50_000),
        post(b'{"texts": [1e999], "languages": [NaN]}'),
        post(GOOD, b"Transfer-Encoding: chunked\r\n"),
    ]
)
REQUESTS = st.lists(st.one_of(PIECES, PIECES, st.binary(max_size=40)), max_size=6)


@pytest.fixture(scope="module")
def any_kind():
    with serving(make_app(Echo(), LIMITS, max_waiting=16)) as port:
        yield port


@given(parts=REQUESTS, resets=st.booleans())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_requests_of_any_kind(any_kind, parts, resets):
    """None is answered by a status of 500 or above, and the next client is served."""
    answer = b""
    with socket.create_connection(("127.0.0.1", any_kind), timeout=0.15) as client:
        try:
            client.sendall(b"".join(parts))
            while part := client.recv(65536):
                answer += part
        except (TimeoutError, ConnectionError):
            pass  # it waits for the rest of a request, or has closed already
        if resets:
            linger = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    statuses = [int(s) for s in re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.MULTILINE)]
    assert not [s for s in statuses if s >= 500], answer
    assert ask(any_kind, ["a"], ["de"])[0] == 200
