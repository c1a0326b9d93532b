"""Where the sentence pairs come from: message catalogues inside ordinary packages.

Three corpora are known by name:

* ``S`` from four *installed* pip packages (django, plone.app.locales, gramps,
  pycountry);
* ``M`` from three *wheels* in a folder (django, homeassistant, pycountry);
* ``D`` from Debian packages in a folder (mediawiki, firefox-esr-l10n-*,
  libreoffice-l10n-*).

A source yields raw `Entry` triples; cleaning them is the work of `cleaning`.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from examples.translation.files import (
    Files,
    deb_files,
    installed_files,
    missing_packages,
    sha256_of,
    zip_files,
)

CORPORA = ("S", "M", "D")

#: Domains of proper names from ISO standards; results report them apart.
NAME_DOMAINS = frozenset({"pycountry", "iso-codes"})


class Entry(NamedTuple):
    """One message as its catalogue has it."""

    locale: str
    source: str
    english: str


@dataclass(frozen=True)
class Source:
    """One origin of sentence pairs.

    Attributes:
        domain: Its name in the corpus's ``domain`` column.
        version: The version of the package or packages.
        licence: The licence of the text, for the manifest.
        accelerator: The character that marks keyboard accelerators in its messages.
        read: Called with a counter of skipped files (reason -> number); yields entries.
        inputs: SHA-256 of the package files, where the source is read from such.
    """

    domain: str
    version: str
    licence: str
    accelerator: str
    read: Callable[[Counter], Iterator[Entry]]
    inputs: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- finding sources


def corpus_sources(corpus: str, folder: str | Path | None = None) -> list[Source]:
    """Returns the sources of a named corpus, after checking that all are there.

    Args:
        corpus: ``"S"``, ``"M"`` or ``"D"``.
        folder: Where the wheels (``M``) or Debian packages (``D``) lie; searched with
            its subfolders.  Not used by ``S``.

    Raises:
        ValueError: An unknown corpus, or a missing ``folder``.
        MissingPackageError: A pip package of ``S`` is not installed.
        FileNotFoundError: A wheel or Debian package is not in ``folder``.
    """
    if corpus not in CORPORA:
        raise ValueError(
            f"corpus must be one of {', '.join(CORPORA)}. Received: corpus={corpus!r}"
        )
    if corpus == "S":
        return _installed_sources()
    if folder is None:
        raise ValueError(
            f"corpus {corpus} is read from package files: give the folder that they "
            "were downloaded to. Received: folder=None"
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return _wheel_sources(folder) if corpus == "M" else _debian_sources(folder)


def _installed_sources() -> list[Source]:
    plans = (
        ("django", "BSD-3-Clause", read_gettext),
        ("plone.app.locales", "GPL-2.0", read_plone),
        ("gramps", "GPL-2.0-or-later", read_gettext),
        ("pycountry", "LGPL-2.1", read_gettext),
    )
    versions, missing = {}, []
    for name, _, _ in plans:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise missing_packages(missing, "corpus S is made from installed packages")

    def source(name: str, licence: str, reader: Callable) -> Source:
        def read(skipped: Counter) -> Iterator[Entry]:
            return reader(installed_files(name, _is_catalogue), skipped)

        # gramps alone marks accelerators, with "_" as GTK has it.
        accelerator = "_" if name == "gramps" else ""
        return Source(name, versions[name], licence, accelerator, read)

    return [source(*plan) for plan in plans]


def _wheel_sources(folder: Path) -> list[Source]:
    plans = (
        ("django", "BSD-3-Clause", read_gettext, _is_catalogue),
        ("homeassistant", "Apache-2.0", read_json_folders, _is_translation_json),
        ("pycountry", "LGPL-2.1", read_gettext, _is_catalogue),
    )
    wheels = {name: sorted(folder.rglob(f"{name}-*.whl")) for name, *_ in plans}
    missing = [name for name, found in wheels.items() if not found]
    if missing:
        raise FileNotFoundError(
            f"no wheel of {', '.join(missing)} in {folder}. Download them with: "
            "pip download --no-deps --only-binary :all: --ignore-requires-python "
            f"-d {folder} {' '.join(missing)}"
        )
    for name, found in wheels.items():
        if len(found) > 1:
            raise ValueError(
                f"one wheel of {name} is wanted, to be reproducible. Received: "
                f"{', '.join(p.name for p in found)} in {folder}"
            )

    def source(name: str, licence: str, reader: Callable, wanted: Callable) -> Source:
        (wheel,) = wheels[name]

        def read(skipped: Counter) -> Iterator[Entry]:
            return reader(zip_files(wheel, wanted), skipped)

        version = wheel.name.split("-")[1]
        inputs = {wheel.name: sha256_of(wheel)}
        return Source(name, version, licence, "", read, inputs)

    return [source(*plan) for plan in plans]


def _debian_sources(folder: Path) -> list[Source]:
    mediawiki = sorted(folder.rglob("mediawiki_*.deb"))
    firefox = sorted(folder.rglob("firefox-esr-l10n-*.deb"))
    libreoffice = sorted(folder.rglob("libreoffice-l10n-*.deb"))
    missing = [
        name
        for name, found in (
            ("mediawiki", mediawiki),
            (
                "firefox-esr-l10n-en-ca",
                [p for p in firefox if p.name.startswith("firefox-esr-l10n-en-ca_")],
            ),
            ("libreoffice-l10n-*", libreoffice),
        )
        if not found
    ]
    if missing:
        raise FileNotFoundError(
            f"no Debian package {', '.join(missing)} in {folder}. Download them with "
            "apt-get download (docs/corpus.md has the commands)"
        )

    def files(debs: list[Path], wanted: Callable) -> Files:
        for deb in debs:
            yield from deb_files(deb, wanted)

    def source(
        name: str,
        licence: str,
        accelerator: str,
        reader: Callable,
        debs: list[Path],
        wanted: Callable,
    ) -> Source:
        def read(skipped: Counter) -> Iterator[Entry]:
            return reader(files(debs, wanted), skipped)

        versions = sorted({deb.name.split("_")[1].replace("%3a", ":") for deb in debs})
        inputs = {deb.name: sha256_of(deb) for deb in debs}
        return Source(name, " ".join(versions), licence, accelerator, read, inputs)

    return [
        source(
            "mediawiki",
            "GPL-2.0-or-later",
            "",
            read_mediawiki,
            mediawiki,
            _is_translation_json,
        ),
        source(
            "firefox",
            "MPL-2.0",
            "",
            read_firefox,
            firefox,
            lambda path: path.endswith(".xpi"),
        ),
        source("libreoffice", "MPL-2.0", "~", read_gettext, libreoffice, _is_catalogue),
    ]


def _is_catalogue(path: str) -> bool:
    parts = PurePosixPath(path)
    return parts.parent.name == "LC_MESSAGES" and parts.suffix in (".mo", ".po")


def _is_translation_json(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path.endswith(".json") and bool({"translations", "i18n"} & set(parts[:-1]))


# ---------------------------------------------------------------- reading catalogues


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
    """Reads compiled catalogues, ``.../<locale>/LC_MESSAGES/<domain>.mo``.

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
    """Reads Plone's catalogues, whose message ids are keys such as ``label_title``.

    The English is in the extracted comments of the ``.po`` files (``#. Default:``); a
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
    """Reads folders of ``<locale>.json`` with ``en.json`` beside them.

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
    """Reads MediaWiki's ``i18n`` folders."""
    return read_json_folders(files, skipped, plain_wikitext)


_LANGUAGE_PACK = re.compile(r"langpack-(.*?)@")
_LOCALE_FOLDER = re.compile(r"(?:chrome|localization)/[^/]+/(?:locale/[^/]+/)?")
_KEYS_NOT_TEXT = re.compile("accesskey|commandkey", re.IGNORECASE)
_FIREFOX_PIVOT = "en-CA"


def read_firefox(files: Files, skipped: Counter) -> Iterator[Entry]:
    """Reads Firefox's language packs (``.xpi``).

    American English is inside the browser itself, so the English side is the Canadian
    English pack, which differs from it in spelling only.
    """
    packs = {}
    for path, contents in files:
        locale = _LANGUAGE_PACK.search(path)
        if locale:
            packs[locale[1]] = dict(_language_pack(contents, skipped))
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
