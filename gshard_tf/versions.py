"""The versions that this package was tested with, checked when it is first used."""

import functools
import importlib.metadata

# Minor versions: each brings changes to private APIs that `lowering.py`,
# `program.py` and `variables.py` use. Watch those three files on an upgrade.
TESTED = {"tensorflow": "2.20", "keras": "3.15", "jax": "0.10", "jaxlib": "0.10"}


def _version(package: str) -> str:
    # Google ships the same TensorFlow under other names for other hardware.
    names = [package]
    if package == "tensorflow":
        names += ["tensorflow-cpu", "tensorflow-tpu", "tensorflow-intel"]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError(
        f"gshard_tf needs {package} {TESTED[package]}.*, which is not installed. "
        "`pip install gshard-tf` brings the tested versions."
    )


def check_versions() -> None:
    """Raises `ImportError` with a sentence when a version is not a tested one."""
    for package, tested in TESTED.items():
        found = _version(package)
        if found.split(".")[:2] != tested.split("."):
            raise ImportError(
                f"gshard_tf was tested with {package} {tested}.* and uses parts of "
                f"it that change between releases. Received: {package} {found}. "
                f"Install the tested one: pip install '{package}=={tested}.*'"
            )


def check_backend(backend: str) -> None:
    """Raises `ImportError` unless Keras runs on its TensorFlow backend."""
    if backend != "tensorflow":
        raise ImportError(
            "gshard_tf runs on Keras's TensorFlow backend. Set "
            "KERAS_BACKEND=tensorflow before keras is imported. "
            f"Received: keras.backend.backend()={backend!r}"
        )


@functools.cache
def check() -> None:
    """Checks the versions and Keras's backend, once.

    Raises:
        ImportError: something is missing, of another version, or set otherwise.
    """
    check_versions()
    import keras

    check_backend(keras.backend.backend())
