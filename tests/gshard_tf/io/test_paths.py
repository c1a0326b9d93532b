"""Paths on this machine's disks; remote ones are refused."""

import argparse
import os
from pathlib import Path

import pytest

from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.atomic_folders import check_folder
from gshard_tf.io.paths import local_path, path_option

REMOTE = [
    "gs://bucket/run",
    "s3://bucket/run",
    "ram://run",
    "hdfs://host:8020/run",
    "hdfs:///run",
    "memory://run",
    "https://host/run",
    "dbfs:/run",
]


@pytest.mark.parametrize("path", REMOTE)
@pytest.mark.parametrize("kind", [str, Path])
def test_remote_paths_are_refused(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    given = kind(path)
    with pytest.raises(ValueError, match="folder must be on a disk") as caught:
        local_path(given, "folder")
    assert f"folder={str(given)!r}" in str(caught.value)
    with pytest.raises(ValueError, match="copy"):
        write_file(given, b"")
    with pytest.raises(ValueError, match="copy"):
        check_folder(given)
    with pytest.raises(argparse.ArgumentTypeError, match="copy"):
        path_option(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/run", "HOME/run"),
        ("~", "HOME"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data/a", "/data/a"),
        (Path("file:///data/a"), "/data/a"),
        ("file:/data/a", "/data/a"),
        ("run", "run"),
        ("a:b/c", "a:b/c"),
        ("C:/run", "C:/run"),
        ("runs/a~b", "runs/a~b"),
        ("/mnt/gs://odd", "/mnt/gs:/odd"),
    ],
)
def test_local_paths(monkeypatch, path, expected):
    monkeypatch.setenv("HOME", "HOME")
    assert local_path(path) == Path(expected)


def test_files_of_another_machine():
    with pytest.raises(ValueError, match="must be on a disk"):
        local_path("file://elsewhere/run")


def test_a_home_that_is_not_known():
    with pytest.raises(ValueError, match="Received: folder='~nobody-of-this-name/a'"):
        local_path("~nobody-of-this-name/a", "folder")
