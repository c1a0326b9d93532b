"""The versions that this package was tested with, checked when it is first used."""

import functools
import importlib.metadata

# Minor versions: each brings changes to private APIs that `spmd/lowering.py`,
# `spmd/program.py` and `spmd/variable.py` use. Watch those three on an upgrade.
TESTED = {"tensorflow": "2.20", "keras": "3.15", "jax": "0.10", "jaxlib": "0.10"}

# On a TPU: Google's wheel with the libtpu that it was built with. pip takes a newer
# libtpu, whose interface to TensorFlow is gone.
TPU_WHEEL, LIBTPU = "2.20.0", "0.0.14"


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


def check_tpu_versions() -> None:
    """Raises `ImportError` where TensorFlow for TPUs would abort the process."""
    found = {}
    for package in ("tensorflow-tpu", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    wheel, libtpu = found["tensorflow-tpu"], found["libtpu"]
    if wheel is None:
        return  # libtpu alone is jax's, for compiling
    if wheel != TPU_WHEEL or libtpu != LIBTPU:
        raise ImportError(
            f"On a TPU gshard_tf was tested with tensorflow-tpu {TPU_WHEEL} and libtpu "
            f"{LIBTPU}, which it was built with. Newer ones (pip's choice) lack what "
            "it calls and abort the process when TensorFlow is imported. Received: "
            f"tensorflow-tpu {wheel}, libtpu {libtpu or 'not installed'}. Install: pip "
            f"install 'tensorflow-tpu=={TPU_WHEEL}' 'libtpu=={LIBTPU}'"
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
    check_tpu_versions()
    import keras

    check_backend(keras.backend.backend())
