"""The server: an ASGI application that translates by a SavedModel.

    python -m gshard_examples.serving runs/default/saved_model

docs/serving.md lists what it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from gshard_examples.serving.batching import Batcher, OverloadedError
from gshard_examples.serving.metrics import Metrics
from gshard_examples.serving.openapi import description
from gshard_examples.serving.requests import Limits, RefusedError, parse
from gshard_examples.serving.unread import CloseUnread

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"


class Translates(Protocol):
    """Interface of a model that the server needs; `model.Model` has it."""

    languages: list[str]

    def translate(self, items: list[tuple]) -> list[dict]: ...


def make_app(
    model: Translates,
    limits: Limits | None = None,
    max_batch: int = 32,
    max_waiting: int = 256,
) -> Starlette:
    """The application.

    Args:
        model: What translates; one call of it at a time.
        limits: Of a request.
        max_batch: The most texts that are translated together.
        max_waiting: The most texts that wait; requests above that get status 503. At
            least as many as one request may hold.

    Raises:
        ValueError: when a number is too small.
    """
    limits = limits or Limits()
    if max_waiting < limits.texts:
        raise ValueError(
            f"max_waiting must be at least {limits.texts}, the texts that one request "
            "may hold, or such a request would never be answered. "
            f"Received: max_waiting={max_waiting}"
        )
    metrics = Metrics()
    batcher = Batcher(
        model.translate, max_batch, max_waiting=max_waiting, on_batch=metrics.batch
    )
    metrics.watch(lambda: batcher.waiting)

    async def translate(request: Request) -> Response:
        with metrics.request() as outcome:
            try:
                async with asyncio.timeout(limits.seconds):
                    items = parse(
                        await _body(request, limits.body_bytes), model.languages, limits
                    )
                    translations = await _unless_gone(request, batcher.submit(items))
                response: Response = JSONResponse({"translations": translations})
            except RefusedError as error:
                response = _error(error.status, str(error))
            except OverloadedError as error:
                response = _error(503, f"try again later: {error}")
                response.headers["Retry-After"] = "1"
            except TimeoutError:
                response = _error(504, f"no answer within {limits.seconds} seconds")
            except ClientDisconnect:
                response = Response(status_code=499)  # the client is gone
            except Exception:  # noqa: BLE001 - the server continues
                log.exception("a translation failed")
                response = _error(500, "the translation failed; the log says why")
            outcome.status = response.status_code
        return response

    async def healthz(request: Request) -> Response:
        if batcher.is_healthy(patience=2 * limits.seconds):
            return JSONResponse({"status": "ok"})
        return _error(503, "the model does not answer")

    async def languages(request: Request) -> Response:
        return JSONResponse({"languages": model.languages})

    async def openapi(request: Request) -> Response:
        return JSONResponse(description(limits))

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.MEDIA_TYPE)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    return Starlette(
        routes=[
            _file("/", "page.html"),
            _file("/page.css", "page.css"),
            _file("/page.js", "page.js"),
            Route("/translate", translate, methods=["POST"]),
            Route("/languages", languages),
            Route("/openapi.json", openapi),
            Route("/healthz", healthz),
            Route("/metrics", show_metrics),
        ],
        middleware=[Middleware(CloseUnread, most_bytes=limits.body_bytes)],
        lifespan=lifespan,
    )


def _file(path: str, name: str) -> Route:
    async def send(request: Request) -> Response:
        # Nothing from elsewhere, and no script within the page: what a translation
        # says is never run. (An empty icon is part of the page.)
        policy = "default-src 'self'; img-src data:"
        return FileResponse(PAGE / name, headers={"Content-Security-Policy": policy})

    return Route(path, send)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


async def _unless_gone(request: Request, work: Coroutine) -> Any:
    """Returns the result of `work`, which is canceled when the client disconnects.

    Args:
        request: The request; its body was read to the end.
        work: What to wait for.

    Raises:
        ClientDisconnect: when the client no longer waits for the answer.
    """
    gone = asyncio.create_task(_gone(request))
    answer = asyncio.create_task(work)
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ClientDisconnect()
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()
        await asyncio.gather(gone, answer, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes:
    """The body, which is not read further than the limit.

    Raises:
        RefusedError: when it is longer, or says that it will be.
    """
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise RefusedError(413, f"the body must have at most {most} bytes")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RefusedError(413, f"the body must have at most {most} bytes")
    return bytes(body)
