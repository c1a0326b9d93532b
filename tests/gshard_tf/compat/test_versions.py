import importlib.metadata
import re
import warnings

import pytest

from gshard_tf.compat import versions


def test_the_installed_versions_are_tested_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions()
    versions.check_backend("tensorflow")


def installed(monkeypatch, package, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == package else real(name),
    )


@pytest.mark.parametrize(
    ("package", "version"),
    [("tensorflow", "2.19.1"), ("keras", "3.12.4"), ("jax", "0.8.3")],
)
def test_refuses_an_older_release(monkeypatch, package, version):
    installed(monkeypatch, package, version)
    with pytest.raises(
        ImportError, match=rf"Received: {package} {re.escape(version)}\. Install one"
    ):
        versions.check_versions()


@pytest.mark.parametrize("package", versions.TESTED)
def test_warns_of_a_newer_release(monkeypatch, package):
    installed(monkeypatch, package, "99.1.2")
    with pytest.warns(UserWarning, match=rf"Received: {package} 99\.1\.2\. Compare"):
        versions.check_versions()


@pytest.mark.parametrize("package", versions.TESTED)
@pytest.mark.parametrize("end", [0, 1])
def test_takes_both_ends_and_candidates(monkeypatch, package, end):
    installed(monkeypatch, package, f"{versions.TESTED[package][end]}.0rc1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions()


@pytest.mark.parametrize("package", versions.TESTED)
def test_says_what_is_missing(monkeypatch, package):
    version = importlib.metadata.version

    def missing(name):
        if name.startswith(package):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=f"gshard_tf needs {package} .*not installed"):
        versions.check_versions()


def test_takes_tensorflow_under_its_other_names(monkeypatch):
    version = importlib.metadata.version

    def renamed(name):
        if name == "tensorflow":
            raise importlib.metadata.PackageNotFoundError(name)
        return version("tensorflow") if name == "tensorflow-cpu" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", renamed)
    versions.check_versions()


def test_refuses_another_backend():
    with pytest.raises(ImportError, match=r"KERAS_BACKEND=tensorflow.*='jax'"):
        versions.check_backend("jax")


@pytest.mark.parametrize(
    ("wheel", "libtpu", "fits"),
    [
        ("2.20.0", "0.0.14", True),
        (None, "0.0.52", True),  # jax's, for compiling
        ("2.20.0", "0.0.52", False),
        ("2.20.0", None, False),
        ("2.19.1", "0.0.14", False),
    ],
)
def test_the_versions_on_a_tpu(monkeypatch, wheel, libtpu, fits):
    installed = {"tensorflow-tpu": wheel, "libtpu": libtpu}

    def version(name):
        if installed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    if fits:
        versions.check_tpu_versions()
    else:
        with pytest.raises(ImportError, match=r"pip install .*'libtpu==0\.0\.14'"):
            versions.check_tpu_versions()
