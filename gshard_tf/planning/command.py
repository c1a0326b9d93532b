"""Runs `gshard-plan` on arguments that `arguments` has parsed and checked."""

import argparse
import contextlib
import importlib
import importlib.util
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import keras
import rich.console
import rich.progress
import tensorflow as tf

from gshard_tf.compat.keras_seeds import own_global_seed_generator
from gshard_tf.io.command_line import INTERRUPTED, report
from gshard_tf.layouts.partition_spec import axes_of
from gshard_tf.planning import planner
from gshard_tf.planning.arguments import Target
from gshard_tf.planning.compare import compare
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.search import find_layout
from gshard_tf.runtime.devices import request_cpu_devices
from gshard_tf.sharding.mesh import create_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.spmd.abstract import AbstractStrategy

FITS, DOES_NOT_FIT = 0, 3


class FunctionError(ValueError):
    """An error for a function that cannot be found, or that raises."""


def run(options: argparse.Namespace) -> int:
    """Plans or compares; returns the exit status.

    Args:
        options: Checked arguments of `gshard_tf.planning.arguments.parser()`.
    """
    try:
        if options.compare:
            return _compare(options)
        if options.search:
            return _search(options)
        return _plan(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # such as jaxlib's: no other input would avoid it
        return report("gshard-plan", error)
    except KeyboardInterrupt:
        return report("gshard-plan", "stopped", INTERRUPTED)


def _compare(options: argparse.Namespace) -> int:
    plans: list[Plan] = []
    for path in options.compare:
        try:
            plans.append(Plan.from_json(path.read_text("utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    print(compare(*plans))
    _write_page(options, plans)
    return FITS


def _prepare(options: argparse.Namespace) -> tuple[Callable[[], keras.Model], Any]:
    """Returns the function that creates the model, and the batch."""
    # Their number cannot change once jax has started, so the largest comes first.
    cpu_counts = [int(n[4:]) for n in options.topology if n.startswith("cpu:")]
    if cpu_counts:
        request_cpu_devices(max(cpu_counts))
    function = _find(options.target)
    if cpu_counts:  # the file may have requested fewer
        request_cpu_devices(max(cpu_counts))
    if options.batch is None:
        batch = _returned_batch(function, options)
    else:
        batch = tf.nest.map_structure(
            lambda spec: tf.TensorSpec(spec.shape, spec.dtype), options.batch
        )

    def build() -> keras.Model:
        return _split(_call(function, options.target))[0]

    return build, batch


def _plan(options: argparse.Namespace) -> int:
    build, batch = _prepare(options)
    plans: list[Plan] = []
    for name in options.topology:
        _say(f"planning for {name} ...")
        start = time.perf_counter()
        result = planner.plan(
            build,
            name,
            mesh=options.mesh,
            rules=_rules(options),
            batch=batch,
            mode=options.mode,
            cache=not options.no_cache,
            progress=_say,
        )
        _say(f"planned for {name} in {time.perf_counter() - start:.1f} s")
        if plans:
            print()
        print(result, flush=True)
        plans.append(result)
        if options.json:
            path = _json_path(options.json, name, len(options.topology))
            path.write_text(result.to_json(), "utf-8")
            _say(f"wrote {path}")
    _write_page(options, plans)
    return FITS if all(each.fits for each in plans) else DOES_NOT_FIT


def _search(options: argparse.Namespace) -> int:
    build, batch = _prepare(options)
    more = {} if options.max_plans is None else {"max_plans": options.max_plans}
    all_fit = True
    for name in options.topology:
        with _progress() as say:
            found = find_layout.find_layout(
                build,
                name,
                batch,
                memory_limit=options.memory_limit,
                mode=options.mode,
                cache=not options.no_cache,
                progress=say,
                **more,
            )
        print(found, flush=True)
        all_fit &= found.best is not None
        if options.json:
            path = _json_path(options.json, name, len(options.topology))
            path.write_text(found.to_json(), "utf-8")
            _say(f"wrote {path}")
    return FITS if all_fit else DOES_NOT_FIT


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields what shows progress: on a terminal a line that changes, else lines."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield _say
        return
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text)


def _rules(options: argparse.Namespace) -> AxisRules | None:
    # New ones for each plan, because they record which rules were used.
    return AxisRules(dict(options.rule)) if options.rule else None


def _write_page(options: argparse.Namespace, plans: list[Plan]) -> None:
    if options.html:
        from gshard_tf.planning.html.page import page  # with jinja2, an extra

        options.html.write_text(page(plans), "utf-8")
        _say(f"wrote {options.html}")


def _json_path(path: pathlib.Path, topology: str, plans: int) -> pathlib.Path:
    if plans == 1:
        return path
    return path.with_name(f"{path.stem}-{topology.replace(':', '-')}{path.suffix}")


def _find(target: Target) -> Callable[[], Any]:
    """Returns the function that a target names."""
    try:
        if target.file is None:
            module = importlib.import_module(target.module)
        else:
            # Modules in its folder can be imported, as with `python FILE`.
            sys.path.insert(0, str(target.file.resolve().parent))
            spec = importlib.util.spec_from_file_location(target.file.stem, target.file)
            if spec is None or spec.loader is None:
                raise FunctionError(
                    f"MODULE must be a Python file. Received: {target.module}"
                )
            module = importlib.util.module_from_spec(spec)
            # Pickling and Keras's own registry look modules up by name.
            sys.modules.setdefault(target.file.stem, module)
            spec.loader.exec_module(module)
    except FunctionError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise FunctionError(_failure(f"importing {target.module}", error)) from error
    function = getattr(module, target.function, None)
    if not callable(function):
        raise FunctionError(
            "MODULE must have the function that creates the model, and "
            f"{target.module} has no function {target.function!r}. Received: {target}"
        )
    return function


def _call(function: Callable[[], Any], target: Target) -> Any:
    try:
        return function()
    except Exception as error:  # a user's function may raise anything
        raise FunctionError(_failure(f"{target}()", error)) from error


def _failure(what: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{pathlib.Path(last.filename).name}, line {last.lineno}"
    return f"{what} failed: {type(error).__name__}: {error} ({place})"


def _split(returned: Any) -> tuple[Any, Any]:
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    return returned, None


def _returned_batch(function: Callable[[], Any], options: argparse.Namespace) -> Any:
    """Returns the batch that the function returns, by running it once."""
    mesh = create_mesh(options.mesh or {"expert": 1}, "CPU")
    axes = {name for _, axis in options.rule for name in axes_of(axis)}
    if axes - set(mesh.dim_names):
        raise ValueError(
            f"The rules name the mesh axes {sorted(axes)}, which must have sizes by "
            "--mesh, such as --mesh data=4,model=2. "
            f"Received: --mesh {options.mesh}"
        )
    strategy = AbstractStrategy(mesh, _rules(options))
    with strategy.scope(), own_global_seed_generator():
        _, batch = _split(_call(function, options.target))
    if batch is None:
        raise ValueError(
            "A plan needs the batch of a step. Give it by --batch, or return (model, "
            f"batch) from {options.target}. Received: batch=None"
        )
    return batch


def _say(text: str) -> None:
    report("gshard-plan", text)
