"""GSPMD's annotations in a module as those of Shardy."""

import re

import jax
import pytest
import tensorflow as tf
from jax._src import config
from jax.interpreters import mlir
from jax.sharding import PartitionSpec
from jaxlib import _jax
from jaxlib.mlir import ir

import gshard_tf
from gshard_tf.compat.shardy import is_shardy_enabled, to_shardy
from gshard_tf.compat.tf_call_module import jax_call
from gshard_tf.sharding.mesh import axis_sizes, use_mesh
from gshard_tf.spmd import lowering

RULES = gshard_tf.AxisRules({"rows": "data", "columns": "model"})


def converted(fn, *shapes, mesh, rules=RULES):
    """The text of a function's module with the annotations of Shardy."""
    device_mesh = gshard_tf.create_mesh(mesh)
    with use_mesh(device_mesh, rules):
        specs = [tf.TensorSpec(shape) for shape in shapes]
        hlo = lowering.lower(*lowering.trace(fn, specs)).hlo
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        to_shardy(module, axis_sizes(device_mesh))
        assert module.operation.verify()
        return str(module)


def test_an_annotation_is_a_constraint_over_axes():
    def fn(x):
        return gshard_tf.annotate(tf.sin(x), ("rows", None, "columns"))

    text = converted(fn, [8, 3, 4], mesh={"data": 4, "model": 2})
    assert 'mesh<["data"=4, "model"=2]>, [{"data"}, {}, {"model"}]>' in text
    assert "mhlo.sharding" not in text and "custom_call" not in text


def test_fewer_slices_than_devices_are_a_part_of_an_axis():
    text = converted(lambda x: gshard_tf.split(x, 0, 4), [8], mesh={"data": 8})
    assert 'mesh<["data"=8]>, [{"data":(1)4}]>' in text


def test_slices_that_no_axes_make_have_a_mesh_of_their_own():
    mesh = {"data": 2, "model": 3}
    text = converted(lambda x: gshard_tf.split(x, 0, 3), [6], mesh=mesh)
    assert 'mesh<["tile_0"=3, "tile_1"=2]>, [{"tile_0"}]>' in text


def test_manual_regions():
    """One operation each, with all that its body calls."""
    spec = ("rows", None)

    def shifted(x):
        axis = gshard_tf.mesh_axis("rows")
        return jax.jit(lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]))(x)

    region = gshard_tf.manual(shifted, [spec], spec)
    text = converted(lambda x: region(region(x)), [8, 3], mesh={"data": 2})
    bodies = re.findall("sdy.manual_computation.*?sdy.return", text, re.S)
    assert len(bodies) == 2 and "SPMD" not in text
    for body in bodies:
        assert 'manual_axes={"data"} (%arg1: tensor<4x3xf32>)' in body
        assert body.count("collective_permute") == 1 and " call @" not in body


def test_a_loop_begins_as_its_argument_is_laid_out():
    def fn(x):
        x = gshard_tf.annotate(x, ("rows", None))
        return tf.while_loop(
            lambda i, x: i < 3, lambda i, x: (i + 1, tf.sin(x)), (0, x)
        )[1]

    text = converted(fn, [8, 8], mesh={"data": 8})
    before, _, body = text.partition(" do {")
    assert before.count("sdy.sharding_constraint") == 1
    assert body.count("sdy.sharding_constraint") == 1


def test_what_has_no_form_is_an_error():
    def partly_manual(x):
        """Manual over one of two axes, which `gshard_tf.manual` does not make."""
        mesh = jax.sharding.AbstractMesh(
            (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        spec = PartitionSpec("data")
        return jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=(spec,),
            out_specs=PartitionSpec(),
            axis_names={"data"},
        )(x)

    with pytest.raises(ValueError, match="Shardy has no form for an annotation"):
        converted(
            lambda x: jax_call(partly_manual, x, platform="cpu"),
            [8, 4],
            mesh={"data": 4, "model": 2},
        )


def test_the_switch_is_jaxs():
    with config.use_shardy_partitioner(False):
        assert not is_shardy_enabled()
    assert is_shardy_enabled() == jax.config.jax_use_shardy_partitioner
