"""Faults in what the cores of a TPU hold."""

from benchmarks.mutants.mutant import Mutant

_HERE = "tests/gshard_tf"
_ASSIGNMENT = f"{_HERE}/tpu/test_device_assignment.py"
_CONSTRUCTION = f"{_HERE}/tpu/test_construction.py"
_CORE_LAYOUTS = f"{_HERE}/tpu/test_core_layouts.py"
_INITIAL = f"{_HERE}/sharding/test_initial_value.py"
_REPLICAS = f"{_HERE}/tpu/test_replicas.py"
_SEMANTICS = f"{_HERE}/tpu/test_semantics.py"

MUTANTS = (
    Mutant(
        "gshard_tf/runtime/core_order.py",
        "itertools.accumulate(reversed(sizes), lambda a, b: a * b)",
        "itertools.accumulate(sizes, lambda a, b: a * b)",
        (f"{_ASSIGNMENT}::test_axes_of_a_mesh_are_directions_of_the_slice",),
        "the first axis of a mesh gets the short ways that are the last one's",
    ),
    Mutant(
        "gshard_tf/tpu/device_assignment.py",
        "    if cores % mesh.size:\n",
        "    if cores < mesh.size:\n",
        (f"{_ASSIGNMENT}::test_refuses_a_mesh_that_does_not_fit",),
        "a slice that is no whole number of meshes is taken",
    ),
    Mutant(
        "gshard_tf/tpu/device_assignment.py",
        "key=lambda box: (-box[3], max(box[:3]), [-n for n in box])",
        "key=lambda box: (box[3], max(box[:3]), [-n for n in box])",
        (f"{_ASSIGNMENT}::test_a_replica_takes_whole_chips",),
        "a replica takes one core of each chip",
    ),
    Mutant(
        "gshard_tf/tpu/core_layouts.py",
        "        for axis in unused:\n",
        "        for axis in unused[:1]:\n",
        (f"{_CORE_LAYOUTS}::test_all_axes_left_over_split_it",),
        "on meshes of three axes a part of a weight lies on two cores",
    ),
    Mutant(
        "gshard_tf/tpu/core_layouts.py",
        "compute = decision.compute or decision.storage",
        "compute = decision.compute",
        (
            f"{_CORE_LAYOUTS}::test_the_axis_left_over_splits_the_largest_dimension_that_divides",
        ),
        "a weight that the axes left over split is not gathered for its use",
    ),
    Mutant(
        "gshard_tf/sharding/initial_value.py",
        "elements(start * row, stop * row)",
        "elements(0, (stop - start) * row)",
        (f"{_INITIAL}::test_boxes",),
        "every core's part of a large weight begins as the first one's",
    ),
    Mutant(
        "gshard_tf/sharding/initial_value.py",
        "at_once = max(1, _CHUNK // row)",
        "at_once = 1 + _CHUNK",
        (f"{_INITIAL}::test_a_box_is_cut_from_short_runs",),
        "the host makes all of a weight to cut a part out of it",
    ),
    Mutant(
        "gshard_tf/random/random_shards.py",
        "return numbers[start - skipped * _GROUP :]",
        "return numbers[: stop - start]",
        (f"{_INITIAL}::test_a_run_of_elements_is_that_of_the_whole",),
        "a part that does not begin at a group of four is shifted",
    ),
    Mutant(
        "gshard_tf/random/random_shards.py",
        '"StatelessTruncatedNormalV2": 256,',
        '"StatelessTruncatedNormalV2": 1,',
        (f"{_INITIAL}::test_a_run_of_elements_is_that_of_the_whole",),
        "parts of truncated normals repeat each other",
    ),
    Mutant(
        "gshard_tf/random/random_shards.py",
        "np.array([total % 2**64, (total >> 64) % 2**64], np.uint64)",
        "np.array([total % 2**64, counter[1]], np.uint64)",
        (f"{_INITIAL}::test_the_counter_carries",),
        "the counter of random numbers loses its carry",
    ),
    Mutant(
        "gshard_tf/tpu/core_shards.py",
        "slice(i * n, (i + 1) * n) for i, n in zip(coordinates, sizes, strict=True)",
        "slice((p - 1 - i) * n, (p - i) * n)\n"
        "            for i, n, p in zip(coordinates, sizes, counts, strict=True)",
        (f"{_CONSTRUCTION}::test_it_starts_as_plain_keras_does",),
        "cores hold the parts in reversed order",
    ),
    Mutant(
        "gshard_tf/tpu/core_shards.py",
        "at = dict(zip(sizes, map(int, position), strict=True))",
        "at = dict(zip(list(sizes)[::-1], map(int, position), strict=True))",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "the place of a core is read with the axes of the mesh swapped",
    ),
    Mutant(
        "gshard_tf/compat/tf_saving.py",
        "            spec.slice_spec: tensor\n",
        "            spec.slice_spec: restored_tensors[0]\n",
        (f"{_CONSTRUCTION}::test_files",),
        "every core gets the first core's part back",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "            if coordinates not in shards:\n",
        "            if True:\n",
        (f"{_CONSTRUCTION}::test_checkpoints_of_ours_have_the_cores_pieces",),
        "a checkpoint reads every copy of a part, to write the last one",
        survives="The copies are equal; what is read too often is lost time alone.",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "tf.tensor_scatter_nd_sub",
        "tf.tensor_scatter_nd_add",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "a scatter that subtracts rows adds them",
    ),
    Mutant(
        "gshard_tf/tpu/strategy.py",
        "tf.nest.map_structure(self._split_examples, (args, kwargs))",
        "(args, kwargs)",
        (f"{_SEMANTICS}::test_inputs_arrive_in_parts",),
        "every core is sent the whole batch of its replica",
    ),
    Mutant(
        "gshard_tf/tpu/core_shards.py",
        "                        value,\n                        dtype=self.dtype,\n",
        "                        value if replica == 0 else tf.zeros_like(value),\n"
        "                        dtype=self.dtype,\n",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "only the first replica has the first values",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "[getattr(replica, method)(value) for replica in self._values]",
        "[getattr(replica, method)(value) for replica in self._values[:1]]",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "an assignment reaches the first replica only",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "        def commit() -> None:\n            for replica in self._values:\n",
        "        def commit() -> None:\n            for replica in self._values[:1]:\n",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "a checkpoint of ours is restored into the first replica only",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "        updates = []\n        for replica in self._values:\n",
        "        updates = []\n        for replica in self._values[-1:]:\n",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "TensorFlow's checkpoints are restored into the last replica only",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "[variables[core].handle for core in cores]",
        "[each.handle for each in variables]",
        (
            f"{_REPLICAS}::test_a_program_is_given_the_parts_in_the_order_of_its_sharding",
        ),
        "a program takes a core's part for that of another core",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "from_layout(self.decision.compute)",
        "from_layout(self.decision.storage)",
        (f"{_REPLICAS}::test_a_table_is_used_in_the_parts_that_its_rule_says",),
        "a weight that is stored in more parts than it is used in is not gathered",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "dims, cores = list(assignment.shape)",
        "dims, cores = list(assignment.shape[::-1])",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "a program puts the parts together along the wrong dimensions",
    ),
    Mutant(
        "gshard_tf/tpu/core_variables.py",
        "delta.indices)[:, None]",
        "delta.indices)[::-1, None]",
        (f"{_REPLICAS}::test_every_replica_holds_its_parts_after",),
        "rows of a sparse update land in each other's places",
    ),
)
