"""Readers of message catalogues, one for each format, from files to `Entry` triples.

Readers take the files of a package and a counter of what they had to skip.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from gshard_examples.translation.package_files import Files, missing_packages, zip_files


class Entry(NamedTuple):
    """One message as its catalogue has it."""

    locale: str
    source: str
    english: str


def _parse_catalogue(path: str, contents: bytes, skipped: Counter):
    """Returns polib's view of a .mo or .po file; None (and a count) if unreadable."""
    try:
        import polib
    except ImportError as error:
        raise missing_packages(["polib"], "catalogues are read with polib") from error
    if not contents:
        skipped["files: empty"] += 1
        return None
    try:
        if path.endswith(".mo"):
            if not _is_whole(contents):
                raise ValueError("cut off")
            return polib.mofile(contents, encoding="utf-8")
        return polib.pofile(contents.decode("utf-8"), encoding="utf-8")
    except UnicodeDecodeError:
        skipped["files: not UTF-8"] += 1
    except (OSError, ValueError, struct.error, IndexError):
        skipped["files: not a catalogue"] += 1
    return None


def _is_whole(catalogue: bytes) -> bool:
    """Says whether all strings of a .mo file lie inside of it.

    polib reads a cut-off catalogue without complaint, and gives halves of messages.
    """
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, messages, translations = struct.unpack_from(order + "8x3I", catalogue)
    for table in (messages, translations):
        places = struct.unpack_from(f"{order}{2 * count}I", catalogue, table)
        ends = (a + b for a, b in zip(places[::2], places[1::2], strict=True))
        if max(ends, default=0) >= len(catalogue):  # each ends with a zero byte
            return False
    return True


def read_gettext(files: Files, skipped: Counter) -> Iterator[Entry]:
    """Reads compiled catalogues, `.../<locale>/LC_MESSAGES/<domain>.mo`.

    A plural message gives two entries: the singular with the first form of the
    translation, the plural with the last.
    """
    for path, contents in files:
        if not path.endswith(".mo"):
            continue
        locale = PurePosixPath(path).parts[-3]
        for entry in _parse_catalogue(path, contents, skipped) or ():
            for source, english in _forms(entry):
                yield Entry(locale, source, english)


def _forms(entry) -> Iterator[tuple[str, str]]:
    """Yields (translation, message) of a polib entry."""
    forms = entry.msgstr_plural
    if not forms:
        yield entry.msgstr, entry.msgid
        return
    if len(forms) > 1:
        yield forms[min(forms)], entry.msgid
    yield forms[max(forms)], entry.msgid_plural


_DEFAULT = re.compile(r'^Default: "(.*)"$', re.MULTILINE)


def read_plone(files: Files, skipped: Counter) -> Iterator[Entry]:
    """Reads Plone's catalogues, whose message ids are keys such as `label_title`.

    The English is in the extracted comments of the `.po` files (`#. Default:`); a
    message whose id is English itself needs none.
    """
    english_of: dict[str, dict[str, str]] = defaultdict(dict)
    compiled = []
    for path, contents in files:
        parts = PurePosixPath(path)
        locale, domain = parts.parts[-3], parts.stem
        if parts.suffix == ".mo":
            compiled.append((path, locale, domain, contents))
        elif locale in ("de", "es", "fr"):  # the defaults are in every language's file
            for entry in _parse_catalogue(path, contents, skipped) or ():
                default = _DEFAULT.search(entry.comment)
                if default:
                    text = default[1].replace('\\"', '"')
                    english_of[domain].setdefault(entry.msgid, text)
    for path, locale, domain, contents in compiled:
        for entry in _parse_catalogue(path, contents, skipped) or ():
            for source, message in _forms(entry):
                english = english_of[domain].get(message)
                if english is None:
                    # No default: English if it looks like a sentence, else a key.
                    if " " not in message and not message[:1].isupper():
                        continue
                    english = message
                yield Entry(locale, source, english)


def _json_object(contents: bytes, skipped: Counter) -> dict:
    if not contents:
        skipped["files: empty"] += 1
        return {}
    try:
        parsed = json.loads(contents.decode("utf-8"))
    except UnicodeDecodeError:
        skipped["files: not UTF-8"] += 1
        return {}
    except ValueError:
        skipped["files: not JSON"] += 1
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _leaves(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, str]]:
    """Yields (path, string) of every string in nested objects."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, str):
        yield path, tree


# Messages with a choice inside (ICU plurals and selects) or references to others.
_CHOICE = re.compile(r"\{\s*\w+\s*,\s*(?:plural|select|number|date)|\[%key:")
_CUSTOM_BUILD = re.compile(r"-[0-9a-f]{32}$")  # Home Assistant's hashed file names


def read_json_folders(
    files: Files, skipped: Counter, plain: Callable[[str], str] = str
) -> Iterator[Entry]:
    """Reads folders of `<locale>.json` with `en.json` beside them.

    Args:
        files: The JSON files.
        skipped: Counts the files that could not be read.
        plain: Turns a message in the project's own mark-up into plain text.
    """
    folders: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path, contents in files:
        parts = PurePosixPath(path)
        folders[str(parts.parent)][_CUSTOM_BUILD.sub("", parts.stem)] = contents
    for folder in sorted(folders):
        locales = folders[folder]
        if "en" not in locales:
            continue
        english = {}
        for key, message in _leaves(_json_object(locales["en"], skipped)):
            text = plain(message)
            if not _CHOICE.search(message) and "{{" not in text and "\n" not in text:
                english[key] = text
        for locale in sorted(locales):
            if locale == "en":
                continue
            for key, message in _leaves(_json_object(locales[locale], skipped)):
                if key in english:
                    yield Entry(locale, plain(message), english[key])


_PLURAL = re.compile(r"\{\{PLURAL:[^|{}]*\|([^{}]*)\}\}", re.IGNORECASE)
_GENDER = re.compile(r"\{\{GENDER:[^|{}]*\|([^{}|]*)[^{}]*\}\}", re.IGNORECASE)
_WIKI_LINK = re.compile(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:(?:https?:)?//\S+|\$\d) ([^\]]*)\]")


def plain_wikitext(text: str) -> str:
    """Returns MediaWiki's message mark-up as plain text: last plural, first gender."""
    text = _PLURAL.sub(lambda match: match[1].split("|")[-1], text)
    text = _GENDER.sub(r"\1", text)
    text = _WIKI_LINK.sub(r"\1", text)
    text = _WEB_LINK.sub(r"\1", text)
    return text.replace("'''", "").replace("''", "").strip()


def read_mediawiki(files: Files, skipped: Counter) -> Iterator[Entry]:
    """Reads MediaWiki's `i18n` folders."""
    return read_json_folders(files, skipped, plain_wikitext)


_LANGUAGE_PACK = re.compile(r"langpack-(.*?)@")
_LOCALE_FOLDER = re.compile(r"(?:chrome|localization)/[^/]+/(?:locale/[^/]+/)?")
_KEYS_NOT_TEXT = re.compile("accesskey|commandkey", re.IGNORECASE)
_FIREFOX_PIVOT = "en-CA"


def read_firefox(files: Files, skipped: Counter) -> Iterator[Entry]:
    """Reads Firefox's language packs (`.xpi`).

    American English is inside the browser itself, so the English side is the Canadian
    English pack, which differs from it in spelling only.
    """
    packs = {}
    for path, contents in files:
        name = _LANGUAGE_PACK.search(path)
        if name:
            packs[name[1]] = dict(_language_pack(contents, skipped))
    english = packs.pop(_FIREFOX_PIVOT, None)
    if english is None:
        raise FileNotFoundError(
            f"no {_FIREFOX_PIVOT} language pack among the Firefox packages. Received: "
            f"{', '.join(sorted(packs)) or 'none'}"
        )
    for locale in sorted(packs):
        for key, message in packs[locale].items():
            if key in english:
                yield Entry(locale, message, english[key])


def _language_pack(contents: bytes, skipped: Counter) -> Iterator[tuple[tuple, str]]:
    for name, data in zip_files(
        contents, lambda n: n.endswith((".ftl", ".properties"))
    ):
        place = _LOCALE_FOLDER.sub("", name, count=1)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            skipped["files: not UTF-8"] += 1
            continue
        messages = _fluent if name.endswith(".ftl") else _properties
        for key, message in messages(text):
            yield (place, key), message


def _fluent(text: str) -> Iterator[tuple[str, str]]:
    try:
        from fluent.syntax import FluentParser, ast
        from fluent.syntax.serializer import serialize_expression
    except ImportError as error:
        raise missing_packages(
            ["fluent.syntax"], "Firefox's messages are read with it"
        ) from error

    def plain(pattern: ast.Pattern) -> str:
        pieces = []
        for element in pattern.elements:
            if isinstance(element, ast.TextElement):
                pieces.append(element.value)
            elif isinstance(element.expression, ast.SelectExpression):
                variants = element.expression.variants
                (default,) = (v for v in variants if v.default)
                pieces.append(plain(default.value))
            else:
                inside = serialize_expression(element.expression).strip()
                pieces.append(f"{{{inside}}}")
        return "".join(pieces)

    for entry in FluentParser(with_spans=False).parse(text).body:
        if not isinstance(entry, ast.Message):
            continue
        if entry.value:
            yield entry.id.name, plain(entry.value)
        for attribute in entry.attributes:
            if attribute.id.name not in ("style", "accesskey", "key"):
                key = f"{entry.id.name}.{attribute.id.name}"
                yield key, plain(attribute.value)


def _properties(text: str) -> Iterator[tuple[str, str]]:
    try:
        import javaproperties
    except ImportError as error:
        raise missing_packages(
            ["javaproperties"], "Firefox's .properties files are read with it"
        ) from error
    for key, message in javaproperties.loads(text).items():
        if not _KEYS_NOT_TEXT.search(key):
            yield key, message
