"""`gshard-plan`: what a Keras step would need on hardware that is not there.

Outside the package, because importing that starts TensorFlow, which takes seconds:
here the arguments are checked first, and `--help` is quick.
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
from typing import Any, NoReturn

from gshard_tf.io.paths import path_option

MODES = ("train", "evaluate", "predict")
DTYPES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 bfloat16 float16 float32 "
    "float64 complex64 complex128".split()
)
DESCRIPTION = """\
Builds a Keras model without allocating its weights, traces one step of it, partitions
that over a mesh and compiles it for a TPU slice or for virtual CPU devices; then says
how much memory a core needs, what it computes and communicates, and where every weight
is. Nothing runs; times are estimates."""
EPILOG = """\
exit status:
  0  every step fits (a CPU has no limit), or plans were compared
  1  an error of gshard-tf or of the compiler, with its traceback
  2  bad input, such as an unknown topology or a function that fails; one sentence says
     what is wrong
  3  planned, and at least one step does not fit into memory

examples:
  gshard-plan model.py:build --topology v5e:2x4 --mesh data=4,model=2 \\
      --batch '(int32[512,128], int32[512,128]), int32[512,128]' --html plan.html
  gshard-plan --compare small.json large.json"""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor of a batch, before TensorFlow is there to say so."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Target:
    """The function that makes the model: of a module, or of a file."""

    module: str
    function: str

    @property
    def file(self) -> Path | None:
        is_file = self.module.endswith(".py") or os.sep in self.module
        return Path(self.module) if is_file else None

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help tells more)\n")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="gshard-plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "target",
        nargs="?",
        type=target,
        metavar="MODULE:FUNCTION",
        help="a dotted module or a .py file, and a function in it that takes no "
        "arguments, makes and compiles a model, and returns it or (model, batch)",
    )
    made.add_argument(
        "--topology",
        action="append",
        type=topology,
        default=[],
        metavar="NAME",
        help="a slice such as v5e:2x4 (8 chips) or v3:8x8 (64 chips, 128 cores), or "
        "cpu:N for N virtual devices; may be given several times",
    )
    made.add_argument(
        "--mesh",
        type=mesh,
        metavar="AXIS=N,...",
        help="its axes, all cores together; by default expert=(number of cores)",
    )
    made.add_argument(
        "--rule",
        action="append",
        type=rule,
        default=[],
        metavar="NAME=AXIS",
        help="split the logical axis NAME over the mesh axis AXIS, or over none "
        "(NAME=none); may be repeated. With any, these are all rules there are; by "
        "default AxisRules.default",
    )
    made.add_argument(
        "--batch",
        type=batch,
        metavar="SPEC",
        help="the global batch that fit passes to a step: (x, y) or x, of tensors such "
        "as int32[512,128], nested by (...) and {'name': ...}; by default what the "
        "function returns beside the model",
    )
    made.add_argument("--mode", choices=MODES, default="train", help="default: train")
    made.add_argument(
        "--json",
        type=output,
        metavar="FILE",
        help="write the plan there; of several, FILE's name gets the topology's",
    )
    made.add_argument(
        "--html", type=output, metavar="FILE", help="write one page of all plans there"
    )
    made.add_argument(
        "--no-cache", action="store_true", help="compile even what is known already"
    )
    made.add_argument(
        "--compare",
        nargs=2,
        type=path_option,
        metavar=("A.json", "B.json"),
        help="instead: show two plans that --json wrote, and the ratio B / A",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    _check(made, options)
    # Before TensorFlow and jax load. Nothing is computed: no accelerator is wanted, and
    # TensorFlow's advice about this machine is not either.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from gshard_tf.planning.cli import run

    return run(options)


def _check(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What one argument alone does not tell; `made.error` exits with status 2."""
    if options.compare:
        others = ("target", "topology", "mesh", "rule", "batch", "json", "no_cache")
        given = [name for name in others if getattr(options, name)]
        if given:
            made.error(
                f"--compare reads two files; it goes with --html only, not with "
                f"{', '.join(given)}"
            )
        for path in options.compare:
            if not path.is_file():
                made.error(f"argument --compare: there is no file {path}")
        return
    if options.target is None:
        made.error("MODULE:FUNCTION is missing: what makes the model?")
    if not options.topology:
        made.error("--topology is missing, such as --topology v5e:2x4")
    twice = {n for n in options.topology if options.topology.count(n) > 1}
    if twice:
        made.error(f"argument --topology: given twice: {', '.join(sorted(twice))}")
    names = [name for name, _ in options.rule]
    for name in names:
        if names.count(name) > 1:
            made.error(f"argument --rule: two rules for {name!r}")
    for name, axis in options.rule:
        if options.mesh and axis is not None and axis not in options.mesh:
            made.error(
                f"argument --rule: {name}={axis} names no axis of the mesh, which has "
                f"{', '.join(options.mesh)}"
            )


# -- one argument each: a value, or an error in a sentence -------------------------


def target(text: str) -> Target:
    """`MODULE:FUNCTION`."""
    module, colon, function = text.rpartition(":")
    if not colon or not module or not function.isidentifier():
        raise argparse.ArgumentTypeError(
            f"a module or a .py file, a colon and a function, such as model.py:build. "
            f"Received: {text!r}"
        )
    found = Target(module, function)
    if found.file is not None:
        if not found.file.is_file():
            raise argparse.ArgumentTypeError(f"there is no file {module!r}")
        return found
    first = module.partition(".")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise argparse.ArgumentTypeError(f"{module!r} is no name of a module")
    # As `python -m` does: what stands in the current folder can be imported.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if importlib.util.find_spec(first) is None:
        raise argparse.ArgumentTypeError(
            f"there is no module {first!r} here or among the installed ones"
        )
    return found


def topology(text: str) -> str:
    """A name that could be one; the compiler knows whether it is."""
    if not re.fullmatch(r"cpu:[1-9]\d*|(?!cpu:)[a-z]\w*:\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"a chip and its slice, such as v5e:2x4, or cpu:8. Received: {text!r}"
        )
    return text


def mesh(text: str) -> dict[str, int]:
    """`data=4,model=2`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)=([1-9]\d*)\s*", part)
        if match is None or match[1] in found:
            raise argparse.ArgumentTypeError(
                "axes, each with a name of its own, and their sizes, such as "
                f"data=4,model=2. Received: {text!r}"
            )
        found[match[1]] = int(match[2])
    return found


def rule(text: str) -> tuple[str, str | None]:
    """`batch=data`, or `embed=none`."""
    match = re.fullmatch(r"([A-Za-z_]\w*)=([A-Za-z_]\w*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            "a logical axis and a mesh axis, such as batch=data, or batch=none. "
            f"Received: {text!r}"
        )
    return match[1], None if match[2] == "none" else match[2]


def batch(text: str) -> Any:
    """Nested tuples and dicts of `Spec`."""
    try:
        # `int32[]` is a scalar; Python wants something between the brackets.
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
            if not all(isinstance(name, str) for name in names):
                raise argparse.ArgumentTypeError(_no_batch(text, "a key is no name"))
            return {
                name: _nest(value, text)
                for name, value in zip(names, values, strict=True)
            }
        case ast.Subscript(value=ast.Name(id=dtype), slice=inner):
            sizes = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            shape = tuple(getattr(size, "value", None) for size in sizes)
            if dtype not in DTYPES:
                raise argparse.ArgumentTypeError(
                    _no_batch(text, f"{dtype!r} is none of the dtypes")
                )
            if not all(type(n) is int and n > 0 for n in shape):
                raise argparse.ArgumentTypeError(
                    _no_batch(text, "every dimension is a whole number above 0")
                )
            return Spec(shape, dtype)
    raise argparse.ArgumentTypeError(
        _no_batch(text, f"{ast.unparse(node)!r} is no tensor")
    )


def _no_batch(text: str, why: str) -> str:
    return (
        f"{why}. A batch is a nest of tensors, such as "
        f"'(int32[512,128], int32[512,128]), int32[512,128]'. Received: {text!r}"
    )


def output(text: str) -> Path:
    """A file that can be written when the work is done."""
    path = path_option(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"a file in a folder that exists. Received: {text!r}"
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
