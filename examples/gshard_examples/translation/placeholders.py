"""Placeholders of a dozen formatting systems, as `{1}`, `{2}`, ... on both sides."""

from __future__ import annotations

import re
from collections import Counter

#: The vocabulary has symbols for this many placeholders.
MAX_PLACEHOLDERS = 9

_PLACEHOLDER = re.compile(
    r"""
      %\(\w+\)[#0\- +]?\d*(?:\.\d+)?[a-zA-Z]          # Python: %(name)s
    | %\d+\$[#0\- +']?\d*(?:\.\d+)?(?:hh?|ll?|z|j)?[a-zA-Z]   # C: %1$s
    | %[#0\-+']?\d*(?:\.\d+)?(?:hh?|ll?|z|j)?[sSdiufFxXgGcpe](?![a-zA-Z]{2})  # C: %s
    | %[nL]\b | %\d+ | %%                             # Qt: %n, %1
    | \$?\{\{?[^{}]*\}?\}                             # {name}, {0}, ${name}, {{name}}
    | \$\d+ | \$[a-zA-Z_]\w*                          # $1, $name
    """,
    re.VERBOSE,
)
_POSITION = re.compile(r"\d+\$")


def _placeholder_kind(placeholder: str) -> str:
    """`%1$s` and `%s` are the same placeholder: a translation may reorder."""
    return (
        _POSITION.sub("", placeholder) if placeholder.startswith("%") else placeholder
    )


def number_placeholders(source: str, english: str) -> tuple[str, str] | None:
    """Replaces the placeholders of both sides by `{1}`, `{2}`, ...

    Args:
        source: The translation.
        english: The English message, which sets the numbers.

    Returns:
        Both sides, or None when they do not have the same placeholders, or have more
        than the vocabulary has symbols for.
    """
    in_english = [_placeholder_kind(p) for p in _PLACEHOLDER.findall(english)]
    in_source = [_placeholder_kind(p) for p in _PLACEHOLDER.findall(source)]
    if not in_english and not in_source:
        return source, english
    if Counter(in_english) != Counter(in_source):
        return None
    numbers = {p: n for n, p in enumerate(dict.fromkeys(in_english), start=1)}
    if len(numbers) > MAX_PLACEHOLDERS:
        return None

    def numbered(match: re.Match[str]) -> str:
        return f"{{{numbers[_placeholder_kind(match[0])]}}}"

    source, english = (_PLACEHOLDER.sub(numbered, text) for text in (source, english))
    return " ".join(source.split()), " ".join(english.split())
