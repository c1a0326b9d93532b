"""The documentation site builds without a warning, and its reference is whole."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from processes import ROOT

PACKAGES = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
REFERENCE = {
    "gshard_tf": "gshard_tf.md",
    "keras_layers": "keras_layers.md",
    "gshard_tf.data": "data.md",
    "gshard_tf.export": "export.md",
    "gshard_tf.random": "random.md",
    "gshard_tf.optimizers": "optimizers.md",
}


def pages(nav):
    """The paths of all pages of a navigation, in their order."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from pages([value] if isinstance(value, str) else value)


@pytest.mark.parametrize("module", REFERENCE)
def test_reference_has_every_public_name(module):
    text = (ROOT / "docs" / "reference" / REFERENCE[module]).read_text("utf-8")
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert len(shown) == len(set(shown))
    assert set(shown) == names - set(REFERENCE)


@pytest.mark.skipif(
    bool(MISSING), reason=f"pip install -e '.[docs]' for {', '.join(MISSING)}"
)
def test_site_builds_without_a_warning(tmp_path):
    from mkdocs.config import load_config

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nav = list(pages(load_config(str(ROOT / "mkdocs.yml"))["nav"]))
    assert len(nav) == len(set(nav)) > 20
    for page in nav:
        path = tmp_path / page.removesuffix(".md") / "index.html"
        if page == "index.md":
            path = tmp_path / "index.html"
        assert path.is_file(), page
    # Signatures and docstrings come from the sources, through lazy imports too.
    text = (tmp_path / "reference" / "gshard_tf" / "index.html").read_text("utf-8")
    assert 'id="gshard_tf.SpmdStrategy"' in text
    assert "at least that of the mesh" in text  # an argument of request_cpu_devices
