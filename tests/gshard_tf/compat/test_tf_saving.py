"""The promises of TensorFlow that `gshard_tf.compat.tf_saving` relies on."""

import tensorflow as tf

from gshard_tf.compat import tf_saving


class Halves(tf.Module):
    """A value of 2 x 3 in two rows, in which a checkpoint sees one value."""

    class Value:
        is_sharded = True

    value = Value()

    def __init__(self, rows):
        super().__init__()
        self._rows = [tf.constant([row]) for row in rows]
        self.restored = None

    def _serialize_to_tensors(self):
        specs = [f"2 3 {i},1:0,3" for i in range(2)]
        return tf_saving.serialized_slices(dict(zip(specs, self._rows, strict=True)))

    def _restore_from_tensors(self, restored_tensors):
        self.restored = dict(tf_saving.restored_slices(restored_tensors))


def test_a_sharded_variable_gets_every_slice_back(tmp_path):
    tf_saving.patch_trackable_restore()
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    path = tf.train.Checkpoint(weight=Halves(rows)).write(str(tmp_path / "sharded"))
    [name] = [n for n, _ in tf.train.list_variables(path) if n.startswith("weight")]
    assert tf.train.load_variable(path, name).tolist() == rows
    halves = Halves(rows)
    tf.train.Checkpoint(weight=halves).read(path)
    restored = {spec: value.numpy().tolist() for spec, value in halves.restored.items()}
    assert restored == {"2 3 0,1:0,3": rows[:1], "2 3 1,1:0,3": rows[1:]}


def test_other_variables_are_restored_as_before(tmp_path):
    tf_saving.patch_trackable_restore()
    variable = tf.Variable([1.0, 2.0])
    path = tf.train.Checkpoint(weight=variable).write(str(tmp_path / "whole"))
    variable.assign([0.0, 0.0])
    tf.train.Checkpoint(weight=variable).read(path)
    assert variable.numpy().tolist() == [1.0, 2.0]


def test_a_whole_value_has_no_slice_spec():
    value = tf.constant([1.0])
    assert tf_saving.restored_slices(tf_saving.serialized_slices(value)) == {"": value}


def test_the_value_to_save_of_a_variable_has_its_dtype_and_device():
    variable = tf.Variable([1.0, 2.0])
    value = tf_saving.value_to_save(variable)
    # The saver calls it when it writes, on the device.
    assert (value.dtype, value.device) == (variable.dtype, variable.device)
    assert value.tensor.numpy().tolist() == [1.0, 2.0]


def test_a_saved_model_takes_a_variable_without_a_value(tmp_path):
    seen = []

    class Exported(tf.Module):
        def __init__(self):
            super().__init__()
            self.weight = tf.Variable([1.0])
            self._whole = tf_saving.uninitialized_variable(
                tf.TensorShape([1]), tf.float32, "whole"
            )

        def _export_to_saved_model_graph(self, object_map, tensor_map, options, **more):
            resources = tf_saving.add_to_saved_model(
                self._whole,
                object_map=object_map,
                tensor_map=tensor_map,
                options=options,
                **more,
            )
            seen.append(tf_saving.in_save_context())
            assert self._whole in object_map
            return resources

    assert not tf_saving.in_save_context()
    tf.saved_model.save(Exported(), str(tmp_path))
    assert seen and all(seen)
