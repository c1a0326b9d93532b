"""Parser of requests, with an error message for everything that is none."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        body_bytes: Size of the request's body.
        texts: Texts in one request.
        text_characters: Of a text; the rest is cut off, and the answer says so.
        seconds: Until the answer must be there.

    Raises:
        ValueError: for one that is not above 0, or `seconds` without an end.
    """

    body_bytes: int = 2 << 20
    texts: int = 32
    text_characters: int = 10_000
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"{name} must be a finite number above 0. Received: {name}={value}"
                )


class RefusedError(ValueError):
    """A request that is not answered; `status` is HTTP's."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parse(body: bytes, languages: Sequence[str], limits: Limits) -> list[tuple]:
    """The (text, language tag, whether it was cut) of a request, as bytes for a model.

    Args:
        body: JSON: `{"texts": ["..."], "languages": ["de"]}`.
        languages: The tags that the model knows.
        limits: What is allowed.

    Raises:
        RefusedError: with what is wrong, what was received and what would be right.
    """
    try:
        content = json.loads(body)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(content, dict) or set(content) != {"texts", "languages"}:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise RefusedError(
            400,
            'the body must be an object {"texts": [...], "languages": [...]}. '
            f"Received: {_short(keys)}",
        )
    texts = _strings(content["texts"], "texts")
    tags = _strings(content["languages"], "languages")
    if not texts:
        raise RefusedError(400, "texts must hold at least one text. Received: []")
    if len(texts) > limits.texts:
        raise RefusedError(
            413, f"texts must hold at most {limits.texts}. Received: {len(texts)} texts"
        )
    if len(texts) != len(tags):
        raise RefusedError(
            400,
            "every text needs one language tag. "
            f"Received: {len(texts)} texts and {len(tags)} tags",
        )
    for tag in tags:
        if tag not in languages:
            near = difflib.get_close_matches(tag[:20], languages, n=3, cutoff=0.5)
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise RefusedError(
                400,
                f"languages must hold tags that GET /languages lists{hint}. "
                f"Received: {_short(tag)}",
            )
    most = limits.text_characters
    # JSON can hold halves of surrogate pairs, which UTF-8 cannot.
    return [
        (text[:most].encode("utf-8", "replace"), tag.encode(), len(text) > most)
        for text, tag in zip(texts, tags, strict=True)
    ]


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise RefusedError(
            400, f"{name} must be a list of strings. Received: {_short(value)}"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"
