"""Command line of `gshard-plan`: parses and checks the arguments, then runs `command`.

TensorFlow takes seconds to start, so it is imported after the checks: `--help` and
errors are quick.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import gshard_tf
from gshard_tf.io.command_line import Parser
from gshard_tf.io.paths import path_option
from gshard_tf.io.stderr_lines import import_quietly
from gshard_tf.layouts.partition_spec import axes_of

MODES = ("train", "evaluate", "predict")
DTYPES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 bfloat16 float16 float32 "
    "float64 complex64 complex128".split()
)
DESCRIPTION = """\
Builds a Keras model without allocating its weights, traces one step of it, partitions
that over a mesh and compiles it for a TPU slice or for virtual CPU devices; then prints
the memory, FLOPs and communication of a core and the layout of every weight. Nothing
runs; times are estimates."""
EPILOG = """\
exit status:
  0  every step fits (a CPU has no limit), or plans were compared
  1  an error of gshard-tf or of the compiler, with its traceback
  2  bad input, such as an unknown topology or a function that fails; one sentence says
     what is wrong
  3  planned, and at least one step does not fit into memory; or no layout was found
     that fits

examples:
  gshard-plan model.py:build --topology v5e:2x4 --mesh data=4,model=2 \\
      --batch '(int32[512,128], int32[512,128]), int32[512,128]' --html plan.html
  gshard-plan model.py:build --topology v5e:4x4 --search --memory-limit 12GB
  gshard-plan --compare small.json large.json"""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor of the batch, without TensorFlow."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Target:
    """The function that creates the model, of a module or of a file."""

    module: str
    function: str

    @property
    def file(self) -> Path | None:
        is_file = self.module.endswith(".py") or os.sep in self.module
        return Path(self.module) if is_file else None

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="gshard-plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--version", action="version", version=f"%(prog)s {gshard_tf.__version__}"
    )
    result.add_argument(
        "target",
        nargs="?",
        type=target,
        metavar="MODULE:FUNCTION",
        help="a dotted module or a .py file, and a function in it that takes no "
        "arguments, makes and compiles a model, and returns it or (model, batch)",
    )
    result.add_argument(
        "--topology",
        action="append",
        type=topology,
        default=[],
        metavar="NAME",
        help="a slice such as v5e:2x4 (8 chips) or v3:8x8 (64 chips, 128 cores), or "
        "cpu:N for N virtual devices; may be given several times",
    )
    result.add_argument(
        "--mesh",
        type=mesh,
        metavar="AXIS=N,...",
        help="its axes, all cores together; by default expert=(number of cores)",
    )
    result.add_argument(
        "--rule",
        action="append",
        type=rule,
        default=[],
        metavar="NAME=AXIS",
        help="split the logical axis NAME over the mesh axis AXIS, over several "
        "(NAME=AXIS+AXIS), or over none (NAME=none); may be repeated. With any, these "
        "are all rules there are; by default AxisRules.default",
    )
    result.add_argument(
        "--batch",
        type=batch,
        metavar="SPEC",
        help="the global batch that fit passes to a step: (x, y) or x, of tensors such "
        "as int32[512,128], nested by (...) and {'name': ...}; by default what the "
        "function returns with the model",
    )
    result.add_argument("--mode", choices=MODES, default="train", help="default: train")
    result.add_argument(
        "--json",
        type=output,
        metavar="FILE",
        help="write the plan there; of several, FILE's name gets the topology's",
    )
    result.add_argument(
        "--html", type=output, metavar="FILE", help="write one page of all plans there"
    )
    result.add_argument(
        "--no-cache", action="store_true", help="compile even what is known already"
    )
    result.add_argument(
        "--search",
        action="store_true",
        help="instead of one plan: find the mesh and the rules, by the estimates of "
        "plans of several; prints a table and the rules as Python text",
    )
    result.add_argument(
        "--memory-limit",
        type=memory,
        metavar="SIZE",
        help="of --search: what a core's step may need, such as 12GB (10^9 bytes "
        "each); by default all that a core has",
    )
    result.add_argument(
        "--max-plans",
        type=count,
        metavar="N",
        help="of --search: how many layouts are planned at most; default: 12",
    )
    result.add_argument(
        "--compare",
        nargs=2,
        type=path_option,
        metavar=("A.json", "B.json"),
        help="instead: show two plans that --json wrote, and the ratio B / A",
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    _check(command_line, options)
    # Set before TensorFlow and jax load. Nothing is computed, so neither an accelerator
    # nor TensorFlow's advice about this machine is of use.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import_quietly("tensorflow")
    from gshard_tf.planning.command import run

    return run(options)


def _check(command_line: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks arguments against each other; `error` exits with status 2."""
    if options.html and importlib.util.find_spec("jinja2") is None:
        command_line.error(
            "argument --html: needs jinja2, which is not installed: "
            "pip install 'gshard-tf[html]'"
        )
    if options.compare:
        others = ("target", "topology", "mesh", "rule", "batch", "json", "no_cache",
                  "search", "memory_limit", "max_plans")  # fmt: skip
        extra = [name for name in others if getattr(options, name)]
        if extra:
            command_line.error(
                f"--compare reads two files; it goes with --html only, not with "
                f"{', '.join(extra)}"
            )
        for path in options.compare:
            if not path.is_file():
                command_line.error(f"argument --compare: there is no file {path}")
        return
    if options.target is None:
        command_line.error("MODULE:FUNCTION is missing: what makes the model?")
    if not options.topology:
        command_line.error("--topology is missing, such as --topology v5e:2x4")
    twice = {n for n in options.topology if options.topology.count(n) > 1}
    if twice:
        command_line.error(
            f"argument --topology: given twice: {', '.join(sorted(twice))}"
        )
    _check_search(command_line, options)
    names = [name for name, _ in options.rule]
    for name in names:
        if names.count(name) > 1:
            command_line.error(f"argument --rule: two rules for {name!r}")
    for name, axis in options.rule:
        if options.mesh and not set(axes_of(axis)) <= set(options.mesh):
            command_line.error(
                f"argument --rule: {name}={axis} must name an axis of the mesh, "
                f"which has {', '.join(options.mesh)}"
            )


def _check_search(
    command_line: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    if not options.search:
        if options.memory_limit or options.max_plans:
            command_line.error("--memory-limit and --max-plans go with --search only")
        return
    given = [f"--{n}" for n in ("mesh", "rule", "html") if getattr(options, n)]
    if given:
        command_line.error(
            f"--search finds the mesh and the rules, and its result has no page; it "
            f"does not go with {', '.join(given)}"
        )
    for name in options.topology:
        if name.startswith("cpu:"):
            command_line.error(
                "--search compares estimates of time, which a CPU has none of; "
                f"--topology must be a TPU slice. Received: {name}"
            )


# -- the types of single arguments -------------------------------------------------


def target(text: str) -> Target:
    """Parses `MODULE:FUNCTION`."""
    module, colon, function = text.rpartition(":")
    if not colon or not module or not function.isidentifier():
        raise argparse.ArgumentTypeError(
            "must be a module or a .py file, a colon and a function, such as "
            f"model.py:build. Received: {text!r}"
        )
    parsed = Target(module, function)
    if parsed.file is not None:
        if not parsed.file.is_file():
            raise argparse.ArgumentTypeError(
                f"must name a file that exists: there is no file {module!r}. "
                f"Received: {text!r}"
            )
        return parsed
    first = module.partition(".")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise argparse.ArgumentTypeError(
            f"must name a module or a .py file. Received: {module!r}"
        )
    # Modules in the current folder can be imported, as with `python -m`.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if importlib.util.find_spec(first) is None:
        raise argparse.ArgumentTypeError(
            "must name a module that is installed or in this folder: there is no "
            f"module {first!r}. Received: {text!r}"
        )
    return parsed


def topology(text: str) -> str:
    """Returns the name of a topology; the compiler checks later whether it exists."""
    if not re.fullmatch(r"cpu:[1-9]\d*|(?!cpu:)[a-z]\w*:\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(
            "must be a chip and its slice, such as v5e:2x4, or cpu:8. "
            f"Received: {text!r}"
        )
    return text


def mesh(text: str) -> dict[str, int]:
    """Parses `data=4,model=2`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)=([1-9]\d*)\s*", part)
        if match is None or match[1] in sizes:
            raise argparse.ArgumentTypeError(
                "must be axes, each with a name of its own, and their sizes, such as "
                f"data=4,model=2. Received: {text!r}"
            )
        sizes[match[1]] = int(match[2])
    return sizes


def rule(text: str) -> tuple[str, str | None]:
    """Parses `batch=data`, `batch=data+model`, or `embed=none`."""
    axis = r"[A-Za-z_]\w*"
    match = re.fullmatch(rf"({axis})=({axis}(?:\+{axis})*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            "must be a logical axis and a mesh axis, such as batch=data, or "
            f"batch=none. Received: {text!r}"
        )
    return match[1], None if match[2] == "none" else match[2]


def memory(text: str) -> float:
    """Parses `12GB`, `900MB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB|kB|B)?", text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(
            f"must be a size above 0, such as 12GB or 900MB. Received: {text!r}"
        )
    return float(match[1]) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}.get(match[2], 1)


def count(text: str) -> int:
    """Parses a whole number above 0."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(
            f"must be a whole number above 0. Received: {text!r}"
        )
    return int(text)


def batch(text: str) -> Any:
    """Parses a batch to nested tuples and dicts of `Spec`."""
    try:
        # `int32[]` is a scalar; Python needs an expression between the brackets.
        tree = ast.parse(text.strip().replace("[]", "[()]"), mode="eval").body
    except SyntaxError as error:
        raise argparse.ArgumentTypeError(
            _no_batch(text, "it does not parse")
        ) from error
    return _nest(tree, text)


def _nest(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_nest(part, text) for part in parts)
        case ast.Dict(keys=keys, values=values):
            names = [
                key.value if isinstance(key, ast.Constant) else getattr(key, "id", None)
                for key in keys
            ]
            names = [name for name in names if isinstance(name, str)]
            if len(names) < len(keys):
                raise argparse.ArgumentTypeError(_no_batch(text, "a key is no name"))
            return {
                name: _nest(value, text)
                for name, value in zip(names, values, strict=True)
            }
        case ast.Subscript(value=ast.Name(id=dtype), slice=inner):
            sizes = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            numbers = [getattr(size, "value", None) for size in sizes]
            shape = tuple(n for n in numbers if type(n) is int and n > 0)
            if dtype not in DTYPES:
                raise argparse.ArgumentTypeError(
                    _no_batch(text, f"{dtype!r} is none of the dtypes")
                )
            if len(shape) < len(numbers):
                raise argparse.ArgumentTypeError(
                    _no_batch(text, "every dimension is a whole number above 0")
                )
            return Spec(shape, dtype)
    raise argparse.ArgumentTypeError(
        _no_batch(text, f"{ast.unparse(node)!r} is no tensor")
    )


def _no_batch(text: str, why: str) -> str:
    return (
        f"{why}. A batch must be a nest of tensors, such as "
        f"'(int32[512,128], int32[512,128]), int32[512,128]'. Received: {text!r}"
    )


def output(text: str) -> Path:
    """Parses the path of a file whose folder exists."""
    path = path_option(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file in a folder that exists. Received: {text!r}"
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
