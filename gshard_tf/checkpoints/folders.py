"""Where the checkpoints of a run are, without reading them."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{10,})")


def steps(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(name.group(1)) for name in found if name)


def path_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:010d}"
