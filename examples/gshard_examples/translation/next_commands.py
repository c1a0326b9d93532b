"""The commands with which one goes on after a run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from gshard_examples.translation.settings import Settings


def setting_flags(settings: Settings) -> list[str]:
    """Returns the flags of all settings that are not the defaults."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            # As one word, which may begin with a minus or be empty.
            flags.append(f"--{name}={value}")
    return flags


def next_commands(
    run: Path, data: Path, settings: Settings, saved_model: Path
) -> list[tuple[str, str]]:
    """Returns what one may want to do, and the shell's command for it.

    Args:
        run: The run's folder.
        data: The corpus's.
        settings: The run's.
        saved_model: The folder of its SavedModel.
    """
    more = dataclasses.replace(settings, steps=2 * settings.steps)
    text, folder = "train as long again", run
    if settings.decays_to_zero:
        # Its rate would have to rise again.
        text, folder = "train twice as long, anew", run.with_name(f"{run.name}-longer")
    folders = ["--run", str(folder), "--data", str(data)]
    language, line = "de", "Guten Tag"
    if settings.language_tags and language not in settings.language_tags:
        language, line = settings.language_tags[0], "..."
    ask = ["gshard-translate", "translate", language, "--run", str(run)]
    train = ["gshard-translate", "run", *folders, *setting_flags(more)]
    serve = ["python", "-m", "gshard_examples.serving", str(saved_model)]
    return [
        ("translate lines", f"echo {shlex.quote(line)} | {shlex.join(ask)}"),
        (text, shlex.join(train)),
        ("serve a page and JSON", shlex.join(serve)),
    ]
