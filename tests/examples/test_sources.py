import io
import json
import shutil
import subprocess
import zipfile
from importlib import metadata

import pytest

from gshard_examples.translation import catalogues, sources
from gshard_examples.translation.package_files import (
    MissingPackageError,
    deb_files,
    installed_files,
)

from .conftest import catalogue


def zipped(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return data.getvalue()


def debian_package(folder, name, files):
    """Builds a .deb with Debian's own tool."""
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: a test\n"
    )
    for path, contents in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(contents)
    deb = folder / f"{name}_1.0_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", root, deb],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(root)
    return deb


def test_gettext_plurals_and_contexts(skipped):
    contents = catalogue(
        [("Open it", "Öffnen"), ("%d cat", "%d cats", ["%d Katze", "%d Katzen"])]
    )
    entries = list(
        catalogues.read_gettext([("x/de/LC_MESSAGES/a.mo", contents)], skipped)
    )
    assert sorted(entries) == [
        ("de", "%d Katze", "%d cat"),
        ("de", "%d Katzen", "%d cats"),
        ("de", "Öffnen", "Open it"),
    ]
    assert not skipped


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "files: empty"),
        (b"nonsense that is no catalogue", "files: not a catalogue"),
        (catalogue([("Open", "Datei")])[:-20], "files: not a catalogue"),
        (
            catalogue([("Open", "Datei")]).replace(b"Datei", b"\xff\xfe\xfd\xfc\xfb"),
            "files: not UTF-8",
        ),
    ],
    ids=["empty", "nonsense", "cut off", "other encoding"],
)
def test_bad_catalogues_are_counted_and_skipped(contents, reason, skipped):
    files = [
        ("x/de/LC_MESSAGES/a.mo", contents),
        ("x/fr/LC_MESSAGES/a.mo", catalogue([("Open it", "Ouvrir")])),
    ]
    assert list(catalogues.read_gettext(files, skipped)) == [
        ("fr", "Ouvrir", "Open it")
    ]
    assert skipped == {reason: 1}


def test_plone_finds_english_in_comments(skipped):
    po = b'#. Default: "The \\"label\\""\nmsgid "label_x"\nmsgstr "Das"\n'
    entries = catalogues.read_plone(
        [
            ("p/de/LC_MESSAGES/plone.po", po),
            (
                "p/nl/LC_MESSAGES/plone.mo",
                catalogue(
                    [("label_x", "Het"), ("label_y", "geen"), ("Two words", "Twee")]
                ),
            ),
        ],
        skipped,
    )
    assert sorted(entries) == [
        ("nl", "Het", 'The "label"'),
        ("nl", "Twee", "Two words"),
    ]


def test_json_folders(skipped):
    english = {"a": {"b": "Turn it on"}, "c": "{n, plural, one {x} other {y}}"}
    german = {"a": {"b": "Einschalten"}, "c": "x", "d": "ohne Englisch"}
    files = [
        ("i/translations/en.json", json.dumps(english).encode()),
        ("i/translations/de.json", json.dumps(german).encode()),
        ("i/translations/fr.json", b"{half"),
        ("i/translations/nl.json", b"\xff"),
        ("i/translations/it.json", b""),
        ("j/translations/de.json", json.dumps(german).encode()),
    ]
    entries = list(catalogues.read_json_folders(files, skipped))
    assert entries == [("de", "Einschalten", "Turn it on")]
    assert skipped == {"files: not JSON": 1, "files: not UTF-8": 1, "files: empty": 1}


def test_wikitext():
    text = "'''$1''' {{PLURAL:$1|page|pages}} in [[Help:X|the help]] [//x.org here]"
    assert catalogues.plain_wikitext(text) == "$1 pages in the help here"


def test_firefox(skipped):
    english = "a = Open { $name }\n    .accesskey = O\n    .label = Open it now\n"
    german = "a = { $name } öffnen\n    .accesskey = f\n    .label = Jetzt öffnen\n"
    choice = "b = { $n ->\n    [one] one tab\n   *[other] many tabs\n }\n"

    def pack(code, fluent, properties):
        return zipped(
            {
                f"localization/{code}/a.ftl": fluent.encode(),
                f"chrome/{code}/locale/{code}/b.properties": properties.encode(),
            }
        )

    files = [
        (
            "x/langpack-en-CA@firefox.xpi",
            pack("en-CA", english + choice, "k=Good day\nk.accesskey=G"),
        ),
        (
            "x/langpack-de@firefox.xpi",
            pack(
                "de",
                german + "b = viele Tabs\n",
                "# c\nk = Gr\\u00fc\\u00df dich\nk.accesskey=T",
            ),
        ),
    ]
    assert sorted(catalogues.read_firefox(files, skipped)) == [
        ("de", "Grüß dich", "Good day"),
        ("de", "Jetzt öffnen", "Open it now"),
        ("de", "viele Tabs", "many tabs"),
        ("de", "{$name} öffnen", "Open {$name}"),
    ]
    with pytest.raises(FileNotFoundError, match="en-CA"):
        list(catalogues.read_firefox(files[1:], skipped))


def test_missing_packages_say_what_to_install(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources.metadata, "version", version)
    with pytest.raises(MissingPackageError, match=r"gshard-tf\[translation\]") as e:
        sources.corpus_sources("S")
    assert "gramps" in str(e.value)


def test_installed_files_come_from_the_record():
    found = dict(installed_files("polib", lambda path: path == "polib.py"))
    assert b"def pofile" in found["polib.py"]


def test_wheels(tmp_path, skipped):
    with pytest.raises(FileNotFoundError, match="pip download"):
        sources.corpus_sources("M", tmp_path)
    mo = catalogue([("Open it", "Öffnen")])
    for name in ("django", "pycountry"):
        (tmp_path / f"{name}-1.2-py3-none-any.whl").write_bytes(
            zipped({f"{name}/locale/de/LC_MESSAGES/d.mo": mo})
        )
    (tmp_path / "homeassistant-2.0-py3-none-any.whl").write_bytes(
        zipped(
            {
                "h/translations/en.json": '{"a": "Turn on"}',
                "h/translations/de.json": '{"a": "Einschalten"}',
            }
        )
    )
    found = sources.corpus_sources("M", tmp_path)
    assert {s.domain: list(s.read(skipped)) for s in found} == {
        "django": [("de", "Öffnen", "Open it")],
        "homeassistant": [("de", "Einschalten", "Turn on")],
        "pycountry": [("de", "Öffnen", "Open it")],
    }
    assert [s.version for s in found] == ["1.2", "2.0", "1.2"]
    (tmp_path / "django-1.3-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(ValueError, match="one wheel of django"):
        sources.corpus_sources("M", tmp_path)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs Debian's dpkg-deb")
def test_debian_packages(tmp_path, skipped):
    with pytest.raises(FileNotFoundError, match="apt-get download"):
        sources.corpus_sources("D", tmp_path)
    i18n = "usr/share/mediawiki/languages/i18n"
    debian_package(
        tmp_path,
        "mediawiki",
        {f"{i18n}/en.json": b'{"a": "My page"}', f"{i18n}/de.json": b'{"a": "Seite"}'},
    )
    for code, text in (("en-CA", "a = Open it"), ("de", "a = Offen")):
        debian_package(
            tmp_path,
            f"firefox-esr-l10n-{code.lower()}",
            {
                f"usr/lib/x/langpack-{code}@firefox.xpi": zipped(
                    {f"localization/{code}/a.ftl": text + "\n"}
                )
            },
        )
    office = debian_package(
        tmp_path,
        "libreoffice-l10n-de",
        {"usr/lib/r/de/LC_MESSAGES/o.mo": catalogue([("~Close it", "S~chließen")])},
    )
    found = sources.corpus_sources("D", tmp_path)
    assert {s.domain: list(s.read(skipped)) for s in found} == {
        "mediawiki": [("de", "Seite", "My page")],
        "firefox": [("de", "Offen", "Open it")],
        "libreoffice": [("de", "S~chließen", "~Close it")],
    }
    assert [s.accelerator for s in found] == ["", "", "~"]
    assert all(len(h) == 64 for s in found for h in s.inputs.values())
    office.write_bytes(office.read_bytes()[:-100])
    with pytest.raises(OSError, match="not a whole Debian package"):
        list(deb_files(office, lambda path: True))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("X",), "Received: corpus='X'"), (("M",), "folder"), (("D", None), "folder")],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        sources.corpus_sources(*arguments)
