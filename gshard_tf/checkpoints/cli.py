"""`gshard-checkpoints`: lists, shows and verifies the checkpoints of a run."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gshard_tf
from gshard_tf.checkpoints import step_folders
from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.io.command_line import Parser, reader_left, report
from gshard_tf.io.paths import path_option

DAMAGED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0; 1 when a checkpoint is damaged; 2 when those asked for are not there.
    """
    parser = Parser(prog="gshard-checkpoints", description=__doc__)
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {gshard_tf.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a line for each checkpoint")
    showing = commands.add_parser("show", help="the arrays of one checkpoint")
    verifying = commands.add_parser("verify", help="read every byte and check it")
    for command in (listing, showing, verifying):
        command.add_argument(
            "folder", type=path_option, help="of the checkpoints, or of their run"
        )
        command.add_argument(
            "--step", type=int, help="which one; else all, or the last"
        )
        command.add_argument("--json", action="store_true", help="for other programs")
    options = parser.parse_args(arguments)
    try:
        folder = _checkpoint_folder(options.folder)
        rows = _rows(folder, options.step, options.command)
    except (OSError, ValueError) as error:
        return report(parser.prog, error)
    try:
        if options.json:
            print(json.dumps(rows, indent=1))
        elif options.command == "show":
            _print_arrays(rows[0])
        else:
            _print_rows(rows)
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    return DAMAGED if any(row["problem"] for row in rows) else 0


def _checkpoint_folder(folder: Path) -> Path:
    """Returns the folder that holds the steps: a run's may be its `checkpoints`.

    Raises:
        FileNotFoundError: when there are no checkpoints.
    """
    for path in (folder, folder / "checkpoints"):
        if step_folders.steps(path):
            return path
    raise FileNotFoundError(
        f"FOLDER must have checkpoints, or a folder 'checkpoints' that has. "
        f"Received: {folder}"
    )


def _rows(folder: Path, step: int | None, command: str) -> list[dict]:
    existing = step_folders.steps(folder)
    if step is not None and step not in existing:
        raise ValueError(
            f"--step must be one of {', '.join(map(str, existing))}. There is no such "
            f"step in {folder}. Received: --step {step}"
        )

    def shown() -> list[int]:
        steps = step_folders.steps(folder) if step is None else [step]
        return steps[-1:] if command == "show" else steps

    rows = step_folders.read_listed(
        shown, lambda number: _row(folder, number, command == "verify")
    )
    return list(rows.values())


def _row(folder: Path, step: int, read_all: bool) -> dict:
    path = step_folders.step_path(folder, step)
    row = {"step": step, "folder": str(path), "problem": ""}
    try:
        manifest = Manifest.read(path, step)
        row |= {
            "epoch": manifest.epoch,
            "bytes": manifest.total_bytes,
            "processes": manifest.processes,
            "mesh": manifest.mesh,
            "logs": manifest.logs,
            "arrays": {
                name: {"shape": array.shape, "dtype": array.dtype, "split": array.split}
                for name, array in manifest.arrays.items()
            },
        }
        if read_all:
            # TensorFlow takes seconds to start, and a listing does not need it.
            from gshard_tf.checkpoints.tensor_bundle import verify

            verify(path, manifest)
    except (CorruptCheckpointError, FileNotFoundError) as error:
        row["problem"] = str(error)
    return row


def _print_rows(rows: list[dict]) -> None:
    for row in rows:
        if row["problem"]:
            print(f"step {row['step']:>10}  DAMAGED: {row['problem']}")
            continue
        mesh = ",".join(f"{axis}={size}" for axis, size in (row["mesh"] or {}).items())
        line = (
            f"step {row['step']:>10}  epoch {row['epoch']:>4}  "
            f"{row['bytes'] / 1e9:.3f} GB  {mesh or 'no mesh'}"
        )
        print(line + _fitting(row["logs"], shutil.get_terminal_size().columns, line))


def _fitting(logs: Mapping[str, float], width: int, line: str) -> str:
    """Returns the metrics that fit behind a line, and how many do not; losses first."""
    names = sorted(logs, key=lambda name: not name.endswith("loss"))
    texts = [f"  {name}={logs[name]:.4g}" for name in names]
    room = width - len(line) - len("  +99 more")
    shown = ""
    for i, text in enumerate(texts):
        if len(shown) + len(text) > room:
            return f"{shown}  +{len(texts) - i} more"
        shown += text
    return shown


def _print_arrays(row: dict) -> None:
    _print_rows([row | {"logs": {}}])
    for name, value in row.get("logs", {}).items():
        print(f"  {name}={value:.6g}")
    for name, array in row.get("arrays", {}).items():
        split = ",".join("-" if axis is None else axis for axis in array["split"])
        print(f"  {name}  {list(array['shape'])}  {array['dtype']}  {split}")


if __name__ == "__main__":
    sys.exit(main())
