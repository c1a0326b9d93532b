"""Packages of peers, and those that are not there."""

import importlib.metadata
from collections.abc import Iterable


def missing(packages: Iterable[str]) -> list[str]:
    """Returns those of the distributions that are not installed."""
    absent = []
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return absent
