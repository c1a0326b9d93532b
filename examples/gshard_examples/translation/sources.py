"""Sources of sentence pairs: message catalogues inside ordinary packages.

Three corpora are known by name:

* `S` from four *installed* pip packages (django, plone.app.locales, gramps,
  pycountry);
* `M` from three *wheels* in a folder (django, homeassistant, pycountry);
* `D` from Debian packages in a folder (mediawiki, firefox-esr-l10n-*,
  libreoffice-l10n-*).

A source yields raw `Entry` triples, read by `catalogues`; cleaning them is the work of
`cleaning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath

from gshard_examples.translation.catalogues import (
    Entry,
    read_firefox,
    read_gettext,
    read_json_folders,
    read_mediawiki,
    read_plone,
)
from gshard_examples.translation.package_files import (
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


@dataclass(frozen=True)
class Source:
    """One origin of sentence pairs.

    Attributes:
        domain: Its name in the corpus's `domain` column.
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


def corpus_sources(corpus: str, folder: str | Path | None = None) -> list[Source]:
    """Returns the sources of a named corpus, after checking that all are there.

    Args:
        corpus: `"S"`, `"M"` or `"D"`.
        folder: Where the wheels (`M`) or Debian packages (`D`) lie; searched with
            its subfolders.  Not used by `S`.

    Raises:
        ValueError: An unknown corpus, or a missing `folder`.
        MissingPackageError: A pip package of `S` is not installed.
        FileNotFoundError: A wheel or Debian package is not in `folder`.
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
    missing = [name for name, paths in wheels.items() if not paths]
    if missing:
        raise FileNotFoundError(
            f"no wheel of {', '.join(missing)} in {folder}. Download them with: "
            "pip download --no-deps --only-binary :all: --ignore-requires-python "
            f"-d {folder} {' '.join(missing)}"
        )
    for name, paths in wheels.items():
        if len(paths) > 1:
            raise ValueError(
                f"one wheel of {name} must be there, to be reproducible. Received: "
                f"{', '.join(p.name for p in paths)} in {folder}"
            )

    def source(name: str, licence: str, reader: Callable, accept: Callable) -> Source:
        (wheel,) = wheels[name]

        def read(skipped: Counter) -> Iterator[Entry]:
            return reader(zip_files(wheel, accept), skipped)

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
        for name, paths in (
            ("mediawiki", mediawiki),
            (
                "firefox-esr-l10n-en-ca",
                [p for p in firefox if p.name.startswith("firefox-esr-l10n-en-ca_")],
            ),
            ("libreoffice-l10n-*", libreoffice),
        )
        if not paths
    ]
    if missing:
        raise FileNotFoundError(
            f"no Debian package {', '.join(missing)} in {folder}. Download them with "
            "apt-get download (docs/corpus.md has the commands)"
        )

    def files(debs: list[Path], accept: Callable) -> Files:
        for deb in debs:
            yield from deb_files(deb, accept)

    def source(
        name: str,
        licence: str,
        accelerator: str,
        reader: Callable,
        debs: list[Path],
        accept: Callable,
    ) -> Source:
        def read(skipped: Counter) -> Iterator[Entry]:
            return reader(files(debs, accept), skipped)

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
