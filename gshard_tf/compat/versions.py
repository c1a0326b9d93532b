"""The versions of what this package stands on, checked when it is first used."""

import contextlib
import functools
import importlib.metadata
import re
import warnings

# From the oldest to the newest release that all tests ran with, ends included. Older
# ones are known to be wrong or lack what is called; newer ones are not known. Private
# APIs, which is what changes, stand in this folder alone.
TESTED = {
    "tensorflow": ("2.20", "2.21"),
    "keras": ("3.13", "3.15"),
    "jax": ("0.9", "0.12"),
    "jaxlib": ("0.9", "0.12"),
}

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
    oldest, newest = TESTED[package]
    raise ImportError(
        f"gshard_tf needs {package} {oldest} to {newest}, which is not installed. "
        f"Install it: pip install '{package}=={newest}.*'"
    )


def _minor(version: str) -> tuple[int, ...]:
    """(2, 21) of 2.21.0rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_versions() -> None:
    """Compares what is installed with the tested range.

    Warns:
        UserWarning: a release is newer than the tested ones.

    Raises:
        ImportError: a release is missing or older than the tested ones.
    """
    for package, (oldest, newest) in TESTED.items():
        installed = _version(package)
        if _minor(installed) < _minor(oldest):
            raise ImportError(
                f"gshard_tf needs {package} {oldest} or newer. Received: {package} "
                f"{installed}. Install one: pip install '{package}=={newest}.*'"
            )
        if _minor(installed) > _minor(newest):
            warnings.warn(
                f"gshard_tf was tested with {package} {oldest} to {newest} and uses "
                f"parts of it that change between releases. Received: {package} "
                f"{installed}. Compare a step with one device before a long run "
                "(gshard_tf.verify), or install a tested release: pip install "
                f"'{package}=={newest}.*'",
                stacklevel=2,
            )


def check_tpu_versions() -> None:
    """Raises `ImportError` where TensorFlow for TPUs would abort the process."""
    found: dict[str, str | None] = {}
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


def check_tensorflow_leaves_tpu() -> None:
    """Raises `ImportError` where TensorFlow would hold the TPU that jax is to run."""
    version = tensorflow_tpu_version()
    if version is not None:
        raise ImportError(
            "SpmdStrategy runs a TPU by jax, so TensorFlow must be one that leaves it "
            "alone. Install: pip uninstall tensorflow-tpu libtpu; pip install "
            "tensorflow 'jax[tpu]'. (gshard_tf.tpu_strategy is for the other one.) "
            f"Received: tensorflow-tpu {version}"
        )


def tensorflow_tpu_version() -> str | None:
    """Returns the version of TensorFlow for TPUs, whose TPU jax must not take."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("tensorflow-tpu")
    return None


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

    Warns:
        UserWarning: a release is newer than the tested ones.

    Raises:
        ImportError: something is missing, too old, or set otherwise.
    """
    check_versions()
    check_tpu_versions()
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Keras could not import its backend: {error}. gshard_tf runs on the "
            'TensorFlow one: set KERAS_BACKEND=tensorflow, or "backend": '
            '"tensorflow" in ~/.keras/keras.json'
        ) from error
    check_backend(keras.backend.backend())
