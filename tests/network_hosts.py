"""Hosts of a network of their own, as Linux's network namespaces: for root only."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import uuid


def possible():
    return os.geteuid() == 0 and shutil.which("ip") is not None


@contextlib.contextmanager
def hosts(count):
    """Yields for each host the beginning of a command that runs on it, and its name.

    Each has its own loopback, address, hostname and table of names; a bridge connects
    them, as a switch would.
    """
    run = uuid.uuid4().hex[:6]
    names = [f"gs{run}{i}" for i in range(count)]
    bridge = f"br{run}"
    table = "127.0.0.1 localhost\n" + "".join(
        f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(names)
    )
    etc = [pathlib.Path("/etc/netns") / name for name in names]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            etc[i].mkdir(parents=True)
            (etc[i] / "hosts").write_text(table)
            _ip("netns", "add", name)
            outside, inside = f"o{run}{i}", f"i{run}{i}"
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            _ip("link", "set", outside, "master", bridge)
            _ip("link", "set", outside, "up")
            _ip("link", "set", inside, "netns", name)
            on = ["-n", name]
            _ip(*on, "addr", "add", f"10.77.0.{i + 1}/24", "dev", inside)
            _ip(*on, "link", "set", inside, "up")
            _ip(*on, "link", "set", "lo", "up")
        yield [
            (
                [*["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]]
                + [f'hostname {name}; exec "$@"', "sh"],
                name,
            )
            for name in names
        ]
    finally:
        for name, folder in zip(names, etc, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr}")
