"""What travels besides the program: manifests, state, data. And a lazy package."""

import importlib.util
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from processes import run_python

import gshard_tf
from gshard_tf import export
from gshard_tf.export.loader import choose_variant
from gshard_tf.export.manifest import fit_layout


def tensor(name, *shape, dtype="int32", layout=None, role="input"):
    return export.Tensor(name, shape, dtype, layout or tuple(None for _ in shape), role)


def manifest(*meshes):
    return export.Manifest(
        model="m",
        mode="train",
        inputs=[tensor("x", 4, 3, layout=("data", None))],
        outputs=[tensor("loss", dtype="float32", role="output")],
        state=[tensor("model/w", 8, 3, dtype="bfloat16", role="weight")],
        updates=[0],
        variants=[export.Variant(mesh, 0, 1) for mesh in meshes],
        platforms=["cpu"],
        versions={"jax": "1"},
    )


EIGHT, FOUR, SQUARE, ONE = (
    {"data": 8, "model": 1},
    {"data": 4, "model": 1},
    {"data": 2, "model": 2},
    {"data": 1, "model": 1},
)


def test_a_manifest_comes_back_as_it_was():
    made = manifest(EIGHT, ONE)
    assert export.Manifest.from_json(made.to_json()) == made
    later = json.dumps({**json.loads(made.to_json()), "format": 2})
    with pytest.raises(ValueError, match="must be of format 1.* Received: format=2"):
        export.Manifest.from_json(later)


@pytest.mark.parametrize(
    ("devices", "mesh", "chosen"),
    [
        (8, None, EIGHT),
        (100, None, EIGHT),
        (7, None, FOUR),
        (1, None, ONE),
        (8, 1, ONE),
        (8, 4, FOUR),
        (8, SQUARE, SQUARE),
    ],
)
def test_the_largest_mesh_that_fits_or_the_one_that_is_asked_for(devices, mesh, chosen):
    made = manifest(EIGHT, FOUR, SQUARE, ONE)
    assert choose_variant(made, devices, mesh).mesh == chosen


@pytest.mark.parametrize(
    ("devices", "mesh", "says"),
    [
        (8, 3, r"Save it again with meshes=\[\.\.\.\]. Received: mesh=3"),
        (8, {"data": 8}, "programs for the meshes"),
        (2, 8, r"needs 8 devices. Smaller ones in this file: \[.*'data': 1"),
    ],
)
def test_meshes_that_cannot_be(devices, mesh, says):
    with pytest.raises(ValueError, match=says):
        choose_variant(manifest(EIGHT, FOUR, SQUARE, ONE), devices, mesh)


def test_what_does_not_divide_is_whole():
    value = tensor("w", 6, 8, layout=("data", "model"))
    assert fit_layout(value, {"data": 2, "model": 4}) == ("data", "model")
    assert fit_layout(value, {"data": 4, "model": 4}) == (None, "model")
    assert fit_layout(value, {"data": 8, "model": 3}) == (None, None)


def test_state_comes_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "model/a": rng.normal(size=(3, 4)).astype("float32"),
        "optimizer/count": np.array(7, "int64"),
        "model/file": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "model/seed": np.array([1, 2], "uint32"),
        "model/none": np.zeros((0, 2), "float16"),
    }
    export.write_state(tmp_path / "s.npz", arrays, step=3)
    found, meta = export.read_state(tmp_path / "s.npz")
    assert meta == {"step": 3}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="must be a state file"):
        export.read_state(tmp_path / "other.npz")


def test_half_of_a_file_is_never_seen(tmp_path, monkeypatch):
    export.write_state(tmp_path / "s.npz", {"a": np.zeros(2)}, step=1)

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gshard_tf.io.atomic_files.write_synced", full)
    with pytest.raises(OSError, match="No space"):
        export.write_state(tmp_path / "s.npz", {"a": np.ones(2)}, step=2)
    assert export.read_state(tmp_path / "s.npz")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_what_is_no_program(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    with pytest.raises(ValueError, match="must be a program file"):
        export.load(tmp_path / "a")
    zipfile.ZipFile(tmp_path / "b", "w").close()
    with pytest.raises(ValueError, match="without a manifest"):
        export.read_manifest(tmp_path / "b")


def test_without_flatbuffers_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install flatbuffers"):
        export.load(tmp_path / "a")


def packed(folder, rows=10):
    x = np.arange(rows * 3).reshape(rows, 3)
    export.write_data(folder, {"x": x.astype("uint8"), "y": x[:, 0]})
    return [tensor("x", 4, 3), tensor("y", 4)]


def test_batches_are_the_rows_in_order(tmp_path):
    batches = export.ArrayBatches(tmp_path, packed(tmp_path))
    assert len(batches) == 2
    for number, first in enumerate([0, 4, 0, 4]):  # two epochs
        x, y = batches.batch(number)
        assert x.dtype == y.dtype == np.int32
        np.testing.assert_array_equal(y, 3 * np.arange(first, first + 4))
        np.testing.assert_array_equal(x[:, 0], y)


def test_shuffled_batches_are_a_function_of_seed_and_number(tmp_path):
    inputs = packed(tmp_path)
    seen = {}
    for seed in (0, 1):
        batches = export.ArrayBatches(tmp_path, inputs, shuffle=seed)
        seen[seed] = [batches.batch(i)[1] for i in range(6)]
        # Another reader that begins in the middle reads the same.
        again = export.ArrayBatches(tmp_path, inputs, shuffle=seed)
        np.testing.assert_array_equal(again.batch(3)[1], seen[seed][3])
        for epoch in range(3):
            rows = np.concatenate(seen[seed][2 * epoch : 2 * epoch + 2])
            assert len(set(rows)) == 8, "a row twice in an epoch"
    different = [
        not np.array_equal(a, b) for a, b in zip(seen[0], seen[1], strict=True)
    ]
    assert any(different)
    assert not np.array_equal(np.sort(seen[0][0]), np.sort(seen[0][2]))


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (
            [tensor("z", 4)],
            {},
            "an input 'z', so the file .*must exist.*Received.*'x', 'y'",
        ),
        ([tensor("x", 4, 2)], {}, r"must fit .* int32\[2\]. Received: uint8\[3\]"),
        ([tensor("x", 4, 3, dtype="bool")], {}, r"bool\[3\]. Received: uint8"),
        ([tensor("x", 11, 3)], {}, "must fill at least one batch. Received: 10 rows"),
        ([tensor("x", 4, 3)], {"every_row": True}, "must be a whole number of batches"),
        ([tensor("x", 4, 3), tensor("y", 5)], {}, r"batch sizes=\[4, 5\]"),
    ],
)
def test_data_that_do_not_fit(tmp_path, inputs, options, says):
    packed(tmp_path)
    with pytest.raises(ValueError, match=says):
        export.ArrayBatches(tmp_path, inputs, **options)


def test_data_of_unequal_rows(tmp_path):
    with pytest.raises(ValueError, match="rows={'x': 2, 'y': 3}"):
        export.write_data(tmp_path, {"x": np.zeros(2), "y": np.zeros(3)})


def test_batches_are_named_as_fit_passes_them():
    assert list(export.batch_arrays(1)) == ["x"]
    assert export.batch_arrays((1, 2, None)) == {"x": 1, "y": 2}
    nest = ({"b": 1, "a": [2, 3]}, 4, 5)
    assert export.batch_arrays(nest) == {
        "x.a.0": 2,
        "x.a.1": 3,
        "x.b": 1,
        "y": 4,
        "sample_weight": 5,
    }
    with pytest.raises(ValueError, match="a tuple of 4"):
        export.batch_arrays((1, 2, 3, 4))


# ------------------------------------------------------------------------ the package


def test_the_package_loads_without_tensorflow_until_it_is_needed():
    printed = run_python(
        """
        import sys
        import gshard_tf
        from gshard_tf import export
        import gshard_tf.export.runner
        heavy = {"tensorflow", "keras", "jax"} & set(sys.modules)
        print(sorted(heavy), "AxisRules" in dir(gshard_tf))
        try:
            gshard_tf.nonsense
        except AttributeError as error:
            print(error)
        gshard_tf.AxisRules
        print(sorted({"tensorflow", "keras"} & set(sys.modules)))
        """,
        loaded=False,
    )
    assert printed.splitlines() == [
        "[] True",
        "module 'gshard_tf' has no attribute 'nonsense'",
        "['keras', 'tensorflow']",
    ]


def test_devices_are_there_where_there_is_no_tensorflow():
    """As in "Without the runner" of the guide: nothing has imported them before."""
    printed = run_python(
        """
        import sys
        sys.modules["tensorflow"] = sys.modules["keras"] = None
        from gshard_tf import export
        from gshard_tf.runtime.devices import topology_devices
        print(topology_devices.__name__)
        """,
        loaded=False,
    )
    assert printed.strip() == "topology_devices"


def test_every_name_is_there():
    for name in gshard_tf.__all__:
        assert getattr(gshard_tf, name) is not None
    assert set(gshard_tf.__all__) == set(gshard_tf._HOME)


def test_versions_are_checked_when_a_name_is_first_used():
    printed = run_python(
        """
        import importlib.metadata
        version = importlib.metadata.version
        importlib.metadata.version = (
            lambda name: "0.8.3" if name == "jax" else version(name)
        )
        import gshard_tf
        gshard_tf.export
        try:
            gshard_tf.SpmdStrategy
        except ImportError as error:
            print(error)
        """
    )
    assert "needs jax 0.9 or newer" in printed and "Received: jax 0.8.3" in printed
