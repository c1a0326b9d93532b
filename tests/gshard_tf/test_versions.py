import importlib.metadata

import pytest

from gshard_tf import versions


def test_the_installed_versions_are_tested_ones():
    versions.check_versions()
    versions.check_backend("tensorflow")


@pytest.mark.parametrize("package", versions.TESTED)
def test_refuses_another_version(monkeypatch, package):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "99.1.2" if name == package else version(name),
    )
    with pytest.raises(ImportError, match=rf"Received: {package} 99\.1\.2\. Install"):
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
