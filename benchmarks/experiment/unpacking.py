"""The way of a small folder to a machine that trains, and of its results back."""

import multiprocessing
import os
import pathlib
import shutil
import time
import zipfile
from typing import Any

from benchmarks.experiment import compact
from benchmarks.experiment.carrying import use_cache
from benchmarks.experiment.design import Run
from benchmarks.experiment.preparing import (
    VALIDATION,
    is_packed,
    pack_training,
    pack_validation,
)
from benchmarks.experiment.training import read_about
from benchmarks.experiment.translating import TESTS, write_texts
from benchmarks.harness.command_line import say

#: Programs that are compiled at once.
COMPILERS = 6


def unpack(packed: pathlib.Path, out: pathlib.Path) -> None:
    """Completes a small folder elsewhere: programs, initial states, packed batches.

    What is there already stays. Programs are compiled meanwhile, for jax's cache.

    Args:
        packed: What `prepare` wrote.
        out: A folder on a disk of some gigabytes.
    """
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(packed, out, dirs_exist_ok=True)
    _, _, runs = read_about(out)
    # Each in a process of its own: jax must not start in this one, which only packs.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(COMPILERS, os.cpu_count() or 1), use_cache, (out,)) as pool:
        some = [(out / run.name, run.seed) for run in runs]
        drawn = pool.starmap_async(draw, some, chunksize=1)
        # The longest first.
        programs = sorted(out.glob("*/train.gshard")) + sorted(
            path for path in out.glob("*/*.gshard") if path.name != "train.gshard"
        )
        compiled = pool.map_async(compile_program, programs, chunksize=1)
        _pack(out, runs)
        drawn.get()
        say(f"packed in {time.monotonic() - start:.0f} s")
        for line in compiled.get():
            say(line)
        pool.close()
        pool.join()
    say(f"unpacked in {time.monotonic() - start:.0f} s")


def compile_program(path: pathlib.Path) -> str:
    """Compiles a program, and returns a line that says how that went."""
    from gshard_tf import export

    start, name = time.monotonic(), f"{path.parent.name}/{path.name}"
    try:
        export.load(path)
    except Exception as error:  # noqa: BLE001 (the others may do)
        return f"{name} does not compile: {error!r}"[:2000]
    return f"{name} compiled in {time.monotonic() - start:.0f} s"


def draw(folder: pathlib.Path, seed: int) -> None:
    """Draws the initial state of a run."""
    from gshard_tf import export

    if not (folder / "start.npz").exists():
        arrays = compact.draw_start(folder / "start-small.npz", seed)
        export.write_state(folder / "start.npz", arrays, step=0)


def _pack(out: pathlib.Path, runs: list[Run]) -> None:
    from gshard_examples.translation.settings import Settings

    tokens: Any = None
    for run in runs:
        if not is_packed(folder := out / run.data):
            tokens = tokens or compact.read_tokens(out / "tokens-train.npz.xz")
            pack_training(tokens, Settings.read(out / run.name), folder)
    settings = Settings.read(out / runs[0].name)
    for split in VALIDATION:
        if not is_packed(folder := out / f"data-{split}"):
            held_out = compact.read_tokens(out / f"tokens-{split}.npz.xz")
            pack_validation(held_out, settings, folder)


def collect(data: pathlib.Path, out: pathlib.Path, archive: pathlib.Path) -> None:
    """Puts results into the folder of `prepare`, as if the runs had been made there.

    Args:
        data: The corpus.
        out: The folder.
        archive: The zip file that `train` wrote.
    """
    from gshard_examples.translation.corpus import load_corpus

    with zipfile.ZipFile(archive) as file:
        file.extractall(out)
    size, languages, runs = read_about(out)
    corpus = load_corpus(data)
    for run in runs:
        if all((out / run.name / f"translated-{name}").exists() for name in TESTS):
            write_texts(corpus, out, size, languages, run)
