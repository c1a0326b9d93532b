"""OpenAPI 3.1 description of the server's JSON, for clients that are generated."""

from __future__ import annotations

from typing import Any

import gshard_tf
from gshard_examples.serving.requests import Limits


def description(limits: Limits) -> dict[str, Any]:
    """Returns the document that `/openapi.json` answers with.

    Args:
        limits: Of a request.
    """
    text, number, flag = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
    texts = _array(text) | {"minItems": 1, "maxItems": limits.texts}
    scored = _object({"text": text, "score": number})
    translation = _object(
        {
            "text": text,
            "score": number,
            "truncated": flag,
            "unfinished": flag,
            "n_best": _array(scored),
        }
    )
    error = _object({"error": text})
    errors = {
        400: "no proper request",
        413: "too many texts, or too large a body",
        500: "the translation failed",
        503: "too many texts wait",
        504: "no answer in time",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gshard-tf translator",
            "description": "Translates into English by an exported SavedModel.",
            "version": gshard_tf.__version__,
        },
        "paths": {
            "/translate": {
                "post": {
                    "summary": "Translations of texts, each with its language's tag",
                    "requestBody": {
                        "required": True,
                        "content": _json(_object({"texts": texts, "languages": texts})),
                    },
                    "responses": _answers(
                        _object({"translations": _array(translation)}),
                        {status: (why, error) for status, why in errors.items()},
                    ),
                }
            },
            "/languages": {
                "get": {
                    "summary": "The tags of the languages that the model knows",
                    "responses": _answers(_object({"languages": _array(text)})),
                }
            },
            "/healthz": {
                "get": {
                    "summary": "Whether the model answers",
                    "responses": _answers(
                        _object({"status": text}), {503: ("it does not", error)}
                    ),
                }
            },
        },
    }


def _answers(
    good: dict[str, Any], others: dict[int, tuple[str, dict[str, Any]]] | None = None
) -> dict[str, Any]:
    all_answers = {200: ("the answer", good), **(others or {})}
    return {
        str(status): {"description": text, "content": _json(schema)}
        for status, (text, schema) in all_answers.items()
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }
