"""The server on loopback: answers, limits, bad requests, a flood, and its page."""

import collections
import concurrent.futures
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

pytest.importorskip("uvicorn")

from serving_clients import LIMITS, Echo, Served, ask, call, serving  # noqa: E402

from gshard_examples.serving.app import PAGE, make_app  # noqa: E402
from gshard_examples.serving.requests import Limits  # noqa: E402


@pytest.fixture
def model():
    return Echo()


@pytest.fixture
def server(model):
    app = make_app(model, LIMITS, max_batch=4, max_waiting=16)
    with serving(app) as port:
        yield port


def test_it_answers(server, model):
    status, answer = ask(server, ["Hallo", "x" * 101, ""], ["de", "fr", "sr_Latn"])
    assert status == 200
    found = answer["translations"]
    assert [t["text"] for t in found] == ["de: Hallo", "fr: " + "x" * 20, "sr_Latn: "]
    assert [t["truncated"] for t in found] == [False, True, False]
    assert json.loads(call(server, "GET", "/languages")[1])["languages"] == [
        *Echo.languages
    ]
    assert call(server, "GET", "/healthz") == (200, b'{"status":"ok"}')


def agrees(value, schema):
    """Whether a value of JSON is one of a schema, as far as ours go."""
    match schema["type"]:
        case "object":
            properties = schema["properties"]
            return set(value) == set(schema["required"]) == set(properties) and all(
                agrees(value[name], each) for name, each in properties.items()
            )
        case "array":
            return all(agrees(item, schema["items"]) for item in value)
        case kind:
            types = {"string": str, "boolean": bool, "number": float}
            return type(value) is types[kind]


def test_answers_are_as_openapi_describes_them(server):
    def get(path):
        status, body = call(server, "GET", path)
        return status, json.loads(body)

    document = get("/openapi.json")[1]
    assert document["openapi"] == "3.1.0"
    answers = {
        ("/translate", "post"): ask(server, ["Hallo"], ["de"]),
        ("/translate", "post", 400): ask(server, ["Hallo"], ["xx"]),
        ("/translate", "post", 413): ask(server, ["a"] * 100, ["de"] * 100),
        ("/languages", "get"): get("/languages"),
        ("/healthz", "get"): get("/healthz"),
    }
    for (path, method, *_), (status, answer) in answers.items():
        responses = document["paths"][path][method]["responses"]
        content = responses[str(status)]["content"]["application/json"]
        assert agrees(answer, content["schema"]), (path, status)
    # No route was forgotten, but the page and what is no JSON.
    assert set(document["paths"]) == {path for path, *_ in answers}


def test_requests_are_batched(server, model):
    model.seconds = 0.1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(server, [f"{i}"], ["de"]), range(8)))
    assert [a[1]["translations"][0]["text"] for a in answers] == [
        f"de: {i}" for i in range(8)
    ]
    assert max(model.batches) > 1 and max(model.batches) <= 4 and len(model.batches) < 8


BAD = {
    "nothing": (b"", 400, "must be JSON"),
    "no JSON": (b"texts=a", 400, "must be JSON"),
    "no UTF-8": (b'{"texts": ["\xff\xfe"], "languages": ["de"]}', 400, "UTF-8"),
    "deep": (b"[" * 100_000, 400, "must be JSON"),
    "a list": (b"[]", 400, "Received: 'list'"),
    "a part": (b'{"texts": ["a"]}', 400, r"Received: \['texts'\]"),
    "a number": (b'{"texts": 3, "languages": ["de"]}', 400, "list of strings"),
    "numbers": (b'{"texts": [3], "languages": ["de"]}', 400, r"Received: \[3\]"),
    "null": (b'{"texts": [null], "languages": ["de"]}', 400, "list of strings"),
    "no texts": (b'{"texts": [], "languages": []}', 400, "at least one"),
    "few tags": (b'{"texts": ["a", "b"], "languages": ["de"]}', 400, "1 tags"),
    "a tag": (b'{"texts": ["a"], "languages": ["xx"]}', 400, "Received: 'xx'"),
    "near": (b'{"texts": ["a"], "languages": ["sr_Lat"]}', 400, "near it: sr_Latn"),
    "10,000": (
        json.dumps({"texts": ["a"] * 10_000, "languages": ["de"] * 10_000}).encode(),
        413,
        "at most 8. Received: 10000",
    ),
    "3 MB": (b'{"texts": ["' + b"a" * 3_000_000, 413, "2000000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server, name):
    body, status, message = BAD[name]
    found, answer = call(server, "POST", "/translate", body)
    assert found == status
    assert re.search(message, json.loads(answer)["error"])
    assert len(answer) < 2_000


def test_odd_but_good_requests(server):
    """1 MB of text is cut and says so; what is no UTF-8 within JSON is replaced."""
    status, answer = ask(server, ["a" * 1_000_000], ["de"])
    assert status == 200 and answer["translations"][0]["truncated"]
    body = b'{"texts": ["\\ud800 a\\u0000"], "languages": ["de"]}'
    assert call(server, "POST", "/translate", body)[0] == 200
    assert call(server, "GET", "/translate")[0] == 405
    assert call(server, "GET", "/nowhere")[0] == 404
    assert call(server, "GET", "/../app.py")[0] == 404


def test_a_broken_model_breaks_its_batch_only(server):
    assert ask(server, ["break"], ["de"])[0] == 500
    assert ask(server, ["a"], ["de"])[0] == 200


def test_what_takes_too_long(server, model):
    model.seconds = 3.0
    begun = time.monotonic()
    status, answer = ask(server, ["a"], ["de"])
    assert status == 504 and "within 2.0 seconds" in answer["error"]
    assert time.monotonic() - begun < 2.9
    # A client that sends half of its request and waits.
    with socket.create_connection(("127.0.0.1", server)) as slow:
        slow.sendall(
            b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
        )
        slow.settimeout(5)
        assert b" 504 " in slow.recv(100)
    model.seconds = 0.0
    time.sleep(1.0)
    assert ask(server, ["a"], ["de"])[0] == 200


def test_a_flood(server, model):
    """More than may wait, with bad requests among it: refused at once, none lost."""
    model.seconds = 0.05
    bodies = [body for body, _, _ in BAD.values()]

    def one(i):
        if i % 3 == 0:
            return call(server, "POST", "/translate", bodies[i // 3 % len(bodies)])[0]
        return ask(server, ["a"] * 4, ["de"] * 4)[0]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        statuses = collections.Counter(pool.map(one, range(240)))
    assert set(statuses) == {200, 400, 413, 503}, statuses
    assert call(server, "GET", "/healthz")[0] == 200
    model.seconds = 0.0
    assert ask(server, ["a"], ["de"])[0] == 200
    metrics = call(server, "GET", "/metrics")[1].decode()
    for status, count in statuses.items():
        [found] = re.findall(
            rf'translate_requests_total{{status="{status}"}} (\S+)', metrics
        )
        assert float(found) == count + (status == 200)
    assert "translate_waiting_texts 0.0" in metrics
    assert "process_resident_memory_bytes" in metrics


def test_health_tells_of_a_model_that_hangs(model):
    limits = Limits(seconds=0.2)
    with serving(make_app(model, limits)) as port:
        model.seconds = 1.5
        assert ask(port, ["a"], ["de"])[0] == 504
        time.sleep(0.4)
        assert call(port, "GET", "/healthz")[0] == 503
        time.sleep(1.2)
        assert call(port, "GET", "/healthz")[0] == 200


TOUCH = """
const typed = new URLSearchParams(location.search);
const wait = setInterval(() => {
  if (!document.querySelector("option")) return;
  clearInterval(wait);
  document.getElementById("language").value = typed.get("language");
  document.getElementById("text").value = typed.get("text");
  document.getElementById("button").click();
}, 20);
"""


def page_after_typing(port, tmp_path, text, language):
    """Returns the page's text after typing a text and pressing the button."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            "--dump-dom",
            f"http://127.0.0.1:{port}/touched?text={text}&language={language}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, complaints


def touched(app):
    """The same application, with a page on which somebody types."""
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    async def page(request):
        html = (PAGE / "page.html").read_text("utf-8")
        html = html.replace("</body>", '<script src="touch.js"></script></body>')
        policy = "default-src 'self'; img-src data:"  # the page's own
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def script(request):
        return Response(TOUCH, media_type="text/javascript")

    app.router.routes += [Route("/touched", page), Route("/touch.js", script)]
    return app


def test_the_page_in_a_browser(model, tmp_path):
    with serving(touched(make_app(model, LIMITS))) as port:
        dom, complaints = page_after_typing(port, tmp_path, "Guten%20Tag", "sr_Latn")
        assert '<p id="best">sr_Latn: Guten Tag</p>' in dom
        # What a model says is text, whatever it looks like.
        assert "<td>&lt;b&gt;one&lt;/b&gt;</td>" in dom
        assert "(sr_Latn)</option>" in dom
        assert complaints == []
        dom, complaints = page_after_typing(port, tmp_path, "break", "de")
        assert "That did not work: the translation failed" in dom
        assert call(port, "GET", "/page.js")[0] == 200


def test_the_page_itself_is_served_as_it_is(server):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=30)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.read() == (PAGE / "page.html").read_bytes()
    assert "default-src 'self'" in response.getheader("Content-Security-Policy")
    connection.close()


@pytest.fixture(scope="module")
def exported(toy_vocabulary, tmp_path_factory):
    from gshard_examples.translation.export import export
    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.settings import Settings
    from gshard_examples.translation.translator import Translator

    settings = Settings(
        encoder_layers=1,
        decoder_layers=1,
        model_dim=16,
        hidden_dim=16,
        heads=2,
        experts=0,
        partitions=0,
    )
    model = make_model(settings, toy_vocabulary)
    translator = Translator(model, toy_vocabulary, max_source=16, max_target=8)
    folder = tmp_path_factory.mktemp("serving") / "saved_model"
    return export(translator, folder), translator


def test_the_command_serves_a_saved_model(exported):
    folder, translator = exported
    server = Served(folder)
    try:
        texts, tags = ["appleo basketo", "", "x " * 500], ["de", "fr", "ru"]
        status, answer = ask(server.port, texts, tags)
        assert status == 200
        found = answer["translations"]
        assert [t["text"] for t in found] == translator.translate(tags, texts)
        assert [t["truncated"] for t in found] == [False, False, True]
        assert len(found[0]["n_best"]) == 4
        languages = json.loads(call(server.port, "GET", "/languages")[1])["languages"]
        assert languages == list(translator.vocabulary.languages)
    finally:
        server.send(signal.SIGINT)
        _, errors = server.ended()
    assert "Traceback" not in errors, errors


def test_the_command_without_a_model(tmp_path, capsys):
    from gshard_examples.serving.__main__ import main

    assert main([str(tmp_path / "nothing")]) == 2
    assert "no model to serve" in capsys.readouterr().err
