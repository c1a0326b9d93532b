"""Runs `gshard-plan` on arguments that `arguments` has parsed and checked."""

import argparse
import importlib
import importlib.util
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_seeds import own_global_seed_generator
from gshard_tf.planning import planner
from gshard_tf.planning.compare import compare
from gshard_tf.planning.html.page import page
from gshard_tf.planning.plan import Plan
from gshard_tf.runtime.devices import request_cpu_devices
from gshard_tf.sharding.mesh import create_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.spmd.abstract import AbstractStrategy

FITS, BAD_INPUT, DOES_NOT_FIT = 0, 2, 3


class FunctionError(ValueError):
    """The function that makes the model could not be found, or it raised."""


def run(options: argparse.Namespace) -> int:
    """Plans or compares; returns the exit status.

    Args:
        options: Of `gshard_tf.planning.arguments.parser()`, checked.
    """
    try:
        if options.compare:
            return _compare(options)
        return _plan(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # of jaxlib, say: nothing that another input would mend
        print(f"gshard-plan: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("gshard-plan: stopped", file=sys.stderr)
        return 130


def _compare(options: argparse.Namespace) -> int:
    plans = []
    for path in options.compare:
        try:
            plans.append(Plan.from_json(path.read_text("utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    print(compare(*plans))
    _write_page(options, plans)
    return FITS


def _plan(options: argparse.Namespace) -> int:
    # Their number cannot change once jax has started, so the most come first.
    wanted = [int(n[4:]) for n in options.topology if n.startswith("cpu:")]
    if wanted:
        request_cpu_devices(max(wanted))
    function = _find(options.target)
    if wanted:  # the file may have asked for fewer
        request_cpu_devices(max(wanted))
    if options.batch is None:
        batch = _returned_batch(function, options)
    else:
        batch = tf.nest.map_structure(
            lambda spec: tf.TensorSpec(spec.shape, spec.dtype), options.batch
        )

    def build() -> keras.Model:
        return _split(_call(function, options.target))[0]

    plans = []
    for name in options.topology:
        _say(f"planning for {name} ...")
        # So that layers are called the same in every plan, whatever was built before.
        keras.backend.clear_session()
        begun = time.perf_counter()
        made = planner.plan(
            build,
            name,
            mesh=options.mesh,
            rules=_rules(options),
            batch=batch,
            mode=options.mode,
            cache=not options.no_cache,
        )
        _say(f"planned for {name} in {time.perf_counter() - begun:.1f} s")
        if plans:
            print()
        print(made, flush=True)
        plans.append(made)
        if options.json:
            path = _json_path(options.json, name, len(options.topology))
            path.write_text(made.to_json(), "utf-8")
            _say(f"wrote {path}")
    _write_page(options, plans)
    return FITS if all(made.fits for made in plans) else DOES_NOT_FIT


def _rules(options: argparse.Namespace) -> AxisRules | None:
    # Anew for each plan: they remember what was used.
    return AxisRules(dict(options.rule)) if options.rule else None


def _write_page(options: argparse.Namespace, plans: list[Plan]) -> None:
    if options.html:
        options.html.write_text(page(plans), "utf-8")
        _say(f"wrote {options.html}")


def _json_path(path: pathlib.Path, topology: str, plans: int) -> pathlib.Path:
    if plans == 1:
        return path
    return path.with_name(f"{path.stem}-{topology.replace(':', '-')}{path.suffix}")


def _find(target: Any) -> Callable[[], Any]:
    """The function that a `gshard_tf.planning.arguments.Target` names."""
    try:
        if target.file is None:
            module = importlib.import_module(target.module)
        else:
            # As `python FILE` does: what stands beside it can be imported.
            sys.path.insert(0, str(target.file.resolve().parent))
            spec = importlib.util.spec_from_file_location(target.file.stem, target.file)
            if spec is None or spec.loader is None:
                raise FunctionError(f"{target.module} is no Python file")
            module = importlib.util.module_from_spec(spec)
            # Pickling and Keras's own registry look modules up by name.
            sys.modules.setdefault(target.file.stem, module)
            spec.loader.exec_module(module)
    except FunctionError:
        raise
    except Exception as error:  # what a user's file raises may be anything
        raise FunctionError(_told(f"importing {target.module}", error)) from error
    function = getattr(module, target.function, None)
    if not callable(function):
        raise FunctionError(f"{target.module} has no function {target.function!r}")
    return function


def _call(function: Callable[[], Any], target: Any) -> Any:
    try:
        return function()
    except Exception as error:  # what a user's function raises may be anything
        raise FunctionError(_told(f"{target}()", error)) from error


def _told(what: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{pathlib.Path(last.filename).name}, line {last.lineno}"
    return f"{what} failed: {type(error).__name__}: {error} ({place})"


def _split(returned: Any) -> tuple[Any, Any]:
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    return returned, None


def _returned_batch(function: Callable[[], Any], options: argparse.Namespace) -> Any:
    """The batch that the function returns beside its model; it runs once for that."""
    mesh = create_mesh(options.mesh or {"expert": 1})
    axes = {axis for _, axis in options.rule if axis is not None}
    if axes - set(mesh.dim_names):
        raise ValueError(
            f"The rules name the mesh axes {sorted(axes)}; give them sizes by --mesh, "
            "such as --mesh data=4,model=2."
        )
    strategy = AbstractStrategy(mesh, _rules(options))
    with strategy.scope(), own_global_seed_generator():
        _, batch = _split(_call(function, options.target))
    if batch is None:
        raise ValueError(
            f"A plan needs the batch of a step. Give it by --batch, or return (model, "
            f"batch) from {options.target}."
        )
    return batch


def _say(text: str) -> None:
    print(f"gshard-plan: {text}", file=sys.stderr, flush=True)
