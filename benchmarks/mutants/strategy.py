"""Faults in the strategy: layouts, annotations, steps, programs, rewrites of HLO."""

from benchmarks.mutants.mutant import Mutant

_HERE = "tests/gshard_tf"
_ARRAYS = f"{_HERE}/runtime/test_device_arrays.py"
_HOST_COPIES = f"{_HERE}/spmd/test_host_copies.py"
_ANNOTATIONS = f"{_HERE}/sharding/test_annotations.py"
_COHERENCE = f"{_HERE}/spmd/test_coherence.py"
_COUNTER_RNG = f"{_HERE}/random/test_threefry.py"
_CUSTOM_LOOPS = f"{_HERE}/spmd/test_custom_loops.py"
_ERRORS = f"{_HERE}/test_errors.py"
_EDITING = f"{_HERE}/hlo/rewrites/test_editing.py"
_FIT = f"{_HERE}/test_fit_inputs.py"
_GUARD = f"{_HERE}/callbacks/test_nonfinite_guard.py"
_HLO_SHARDING = f"{_HERE}/sharding/test_op_sharding.py"
_LAYOUTS = f"{_HERE}/sharding/test_variable_layouts.py"
_VALUES = f"{_HERE}/spmd/test_program_values.py"
_PARITY = f"{_HERE}/test_parity.py"
_REWRITES = f"{_HERE}/hlo/rewrites/test_partition_safely.py"
_RULES = f"{_HERE}/sharding/test_rules.py"
_RIGHT = f"{_REWRITES}::test_right_on_a_mesh"

MUTANTS = (
    Mutant(
        "gshard_tf/sharding/annotations.py",
        "tiles[split_dimension] = int(num_partitions)",
        "tiles[0] = int(num_partitions)",
        (f"{_ANNOTATIONS}::test_split_splits_the_dimension_that_is_named",),
        "split always splits the first dimension",
    ),
    Mutant(
        "gshard_tf/sharding/annotations.py",
        "if num_partitions > size or size % num_partitions:",
        "if num_partitions > size:",
        (f"{_ANNOTATIONS}::test_refuses",),
        "split takes a number of partitions that does not divide the devices",
    ),
    Mutant(
        "gshard_tf/sharding/annotations.py",
        "if rank is not None and len(axes) != rank:",
        "if rank is not None and len(axes) < rank:",
        (f"{_ANNOTATIONS}::test_refuses",),
        "annotate takes more names than there are dimensions",
    ),
    Mutant(
        "gshard_tf/sharding/op_sharding.py",
        "names.index(name) for name in used + unused",
        "names.index(name) for name in unused + used",
        (f"{_HLO_SHARDING}::test_from_layout_is_jaxs_own_sharding",),
        "a slice is on the devices that are to hold another one's copies",
    ),
    Mutant(
        "gshard_tf/sharding/op_sharding.py",
        "np.arange(num_devices).reshape(tiles + [copies])",
        "np.arange(num_devices).reshape([copies] + tiles).T.reshape(tiles + [copies])",
        (f"{_HLO_SHARDING}::test_tiled_with_copies_puts_copies_on_neighbours",),
        "copies of a slice are far from each other",
    ),
    Mutant(
        "gshard_tf/sharding/rules.py",
        "                if name in taken:",
        "                if False:",
        (f"{_RULES}::test_refuses_one_mesh_axis_for_two_dimensions",),
        "two dimensions may be split over one mesh axis",
    ),
    Mutant(
        "gshard_tf/sharding/rules.py",
        'dict.fromkeys(("mlp", "heads", "vocab"), others[0])',
        'dict.fromkeys(("mlp", "heads", "vocab"), others[-1])',
        (f"{_RULES}::test_default_is_the_papers_layout",),
        "the widths go to the last axis of a mesh, not to its second",
    ),
    Mutant(
        "gshard_tf/sharding/rules.py",
        "if p.fullmatch(path)]",
        "if p.match(path)]",
        (f"{_RULES}::test_paths",),
        "a path pattern matches weights whose path only begins so",
    ),
    Mutant(
        "gshard_tf/sharding/rules.py",
        "        if len(matches) > 1:\n",
        "        if False:\n",
        (f"{_RULES}::test_refuses_two_patterns_for_one_weight",),
        "of two patterns for one weight the first wins in silence",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "dims = variable.reference_dims or ()",
        "dims = range(len(variable.shape))",
        (f"{_LAYOUTS}::test_adafactors_rows_and_columns_are_split_as_their_weights",),
        "the column factor of Adafactor is split as the rows are",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "if pattern is not None and not self._is_factor_under(pattern, variable):",
        "if pattern is not None and keras_variable is None:",
        (f"{_LAYOUTS}::test_a_pattern_wins_over_the_names_of_the_layer",),
        "a path pattern does not win over the names of the layer",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "{max(fitting, key=lambda d: shape[d]): axis}",
        "{min(fitting, key=lambda d: shape[d]): axis}",
        (
            "tests/gshard_tf/tpu/test_core_layouts.py::test_the_axis_left_over_splits_the_largest_dimension_that_divides",
        ),
        "fsdp splits the smallest dimension that divides",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "if size % layout.num_shards(d)",
        "if size % layout.mesh.size",
        (f"{_LAYOUTS}::test_adafactors_rows_and_columns_are_split_as_their_weights",),
        "a dimension must divide by all devices to be stored split over one axis",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "axes = [*known, *[None] * (shape.rank - len(known))]",
        "axes = [*[None] * (shape.rank - len(known)), *known]",
        (f"{_LAYOUTS}::test_batches_are_split_by_examples",),
        "a batch is split along its last dimension",
    ),
    Mutant(
        "gshard_tf/sharding/variable_layouts.py",
        "compute=None if self._computes_as_stored(variable) else decision.storage,",
        "compute=None,",
        (f"{_HERE}/planning/test_planner.py::test_weights_spread_over_the_data_axis",),
        "weights under fsdp are not gathered where a step uses them",
    ),
    Mutant(
        "gshard_tf/spmd/lowering.py",
        "        compute_compared_maxima_once(proto),\n",
        "",
        (
            "tests/gshard_tf/hlo/test_recomputed_maxima.py::test_pooled_maxima_of_normalised_images",
        ),
        "the gradient of a maximum is lost where the compiler computes it twice",
    ),
    Mutant(
        "gshard_tf/spmd/lowering.py",
        "        compute_rounding_once(proto),\n",
        "",
        (
            "tests/gshard_tf/hlo/rewrites/test_recomputed_rounding.py::test_bilinear_resizing_equals_tensorflows_kernel",
        ),
        "pixels and their weights come from different roundings",
    ),
    Mutant(
        "gshard_tf/spmd/lowering.py",
        "lambda leaf: next(values) if leaf is LEAF else leaf, structure",
        "lambda leaf: next(values), structure",
        (f"{_CUSTOM_LOOPS}::test_what_a_step_returns_besides_tensors",),
        "what a step returns besides tensors takes the place of a tensor",
    ),
    Mutant(
        "gshard_tf/spmd/step.py",
        "return tuple((tuple(spec.shape), spec.dtype.name) for spec in specs)",
        "return tuple((spec.shape.rank, spec.dtype.name) for spec in specs)",
        (f"{_FIT}::test_batches_of_many_lengths_compile_once_each",),
        "a batch of another length runs the program of the first",
    ),
    Mutant(
        "gshard_tf/spmd/executable.py",
        "for i, value in zip(step.updates, updated, strict=True):",
        "for i, value in list(zip(step.updates, updated, strict=True))[:-1]:",
        (f"{_CUSTOM_LOOPS}::test_run_inside_a_tf_function",),
        "the last variable that a step changes keeps its old value",
    ),
    Mutant(
        "gshard_tf/spmd/step.py",
        "check, self.extended.before_step = self.extended.before_step, None",
        "check = self.extended.before_step",
        (
            f"{_HERE}/verification/test_verify.py::test_one_of_the_steps_of_an_execution_is_verified",
        ),
        "what is to be checked once is checked before every step",
    ),
    Mutant(
        "gshard_tf/spmd/executable.py",
        "                [np.array(array) for array in arrays],\n",
        "                list(arrays),\n",
        (f"{_VALUES}::test_a_skipped_batch_is_a_copy",),
        "a skipped batch is kept in memory that the next one overwrites",
    ),
    Mutant(
        "gshard_tf/spmd/nonfinite.py",
        "jnp.where(stays, before, after) for before, after",
        "jnp.where(stays, after, before) for before, after",
        (f"{_GUARD}::test_a_skipped_step_changes_nothing",),
        "a step that makes NaN is kept, and every other one skipped",
    ),
    Mutant(
        "gshard_tf/spmd/nonfinite.py",
        "jnp.any(~jnp.isfinite(after) & jnp.isfinite(before))",
        "jnp.any(~jnp.isfinite(after))",
        (f"{_VALUES}::test_what_was_infinite_before_may_stay_so",),
        "a metric that begins at infinity keeps every step from training",
    ),
    Mutant(
        "gshard_tf/spmd/nonfinite.py",
        "    stays = jnp.any(broken)\n",
        "    stays = jnp.all(broken)\n",
        (f"{_GUARD}::test_a_skipped_step_changes_nothing",),
        "a step is skipped only if it breaks every variable",
    ),
    Mutant(
        "gshard_tf/runtime/device_arrays.py",
        "return np.array(value, copy=True)",
        "return np.asarray(value)",
        (f"{_VALUES}::test_a_value_that_was_read_is_a_copy",),
        "a value that was read shares memory with what the next step overwrites",
    ),
    Mutant(
        "gshard_tf/spmd/program.py",
        "outputs += [captures[i] for i in step.updates]",
        "outputs += [captures[i - 1] for i in step.updates]",
        (f"{_CUSTOM_LOOPS}::test_run_inside_a_tf_function",),
        "a new value has the layout of another variable",
    ),
    Mutant(
        "gshard_tf/runtime/device_arrays.py",
        "return NamedSharding(mesh, PartitionSpec(*as_jax(layout.spec)))",
        "return NamedSharding(mesh, PartitionSpec(*reversed(as_jax(layout.spec))))",
        (
            f"{_LAYOUTS}::test_the_program_holds_an_eighth_of_the_experts_and_their_slots",
        ),
        "layouts are given to the dimensions in reversed order",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "_initial = self._checksum = None\n        self._host_is_current = False\n",
        "_initial = self._checksum = None\n",
        (f"{_COHERENCE}::test_reads_see_what_the_step_made",),
        "readers see the value before the step",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "self._device_copy = self._initial = None",
        "self._initial = None",
        (f"{_COHERENCE}::test_the_step_sees_writes",),
        "a step does not see what was assigned before it",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "        if self._has_reader_graphs():\n",
        "        if False:\n",
        (f"{_COHERENCE}::test_a_function_of_the_users_between_steps",),
        "a function of the user's reads values from before the step",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "return self._device_copy is not None and self._device_copy.is_deleted()",
        "return False",
        (f"{_ERRORS}::test_a_lost_state_says_so",),
        "a value that was lost in a failed step is not known to be",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "        self._discard_lost()\n        return super().assign(",
        "        return super().assign(",
        (f"{_ERRORS}::test_a_lost_state_says_so",),
        "a lost value cannot be assigned anew",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "        if not self.has_host_copy or self._keeps_host_copy:\n",
        "        if True:\n",
        (f"{_HOST_COPIES}::test_small_ones_keep_their_copy",),
        "every process holds the whole model on its host",
    ),
    Mutant(
        "gshard_tf/spmd/variable.py",
        "and (self.decision is not None or not in_layer_scope())",
        "",
        (f"{_HOST_COPIES}::test_a_layer_may_assign_before_it_names_the_axes",),
        "a weight that is assigned in build is stored whole",
    ),
    Mutant(
        "gshard_tf/sharding/initial_value.py",
        'getattr(initializer, "seed", None), keras.random.SeedGenerator',
        'getattr(initializer, "seed", None), str',
        (f"{_HOST_COPIES}::test_first_values_are_plain_keras",),
        "a generator is asked for the first value at each reading",
    ),
    Mutant(
        "gshard_tf/runtime/device_arrays.py",
        "            return value.copy()\n",
        "            return value\n",
        (f"{_ARRAYS}::test_a_step_may_write_to_what_is_assembled",),
        "the host keeps the memory that shards were made in",
    ),
    Mutant(
        "gshard_tf/random/threefry.py",
        "return index if start is None else index + start",
        "return index",
        (f"{_COUNTER_RNG}::test_replicas_draw_what_one_device_would",),
        "all replicas drop the same positions of their examples",
    ),
    Mutant(
        "gshard_tf/random/threefry.py",
        "stride = stride * tf.cast(parts, tf.uint32)",
        "stride = stride * tf.cast(1, tf.uint32)",
        (f"{_COUNTER_RNG}::test_replicas_draw_what_one_device_would",),
        "examples of different replicas share random numbers",
    ),
    Mutant(
        "gshard_tf/random/threefry.py",
        "ks = _schedule((words[0], words[1]))",
        "ks = _schedule((words[0], words[0]))",
        (f"{_COUNTER_RNG}::test_seeds_give_unrelated_numbers",),
        "half of the seed is not used",
    ),
    Mutant(
        "gshard_tf/random/threefry.py",
        "x1 = x1 + ks[(s + 1) % 3] + tf.constant(s, tf.uint32)",
        "x1 = x1 + ks[(s + 1) % 3]",
        (f"{_COUNTER_RNG}::test_known_answers",),
        "Threefry's key schedule repeats",
    ),
    Mutant(
        "gshard_tf/random/threefry.py",
        "tf.cast(top, tf.float32) * (1.0 / (1 << 24))",
        "tf.cast(top, tf.float32) * (1.0 / (1 << 25))",
        (f"{_COUNTER_RNG}::test_uniform",),
        "random numbers lie in [0, 0.5), so everything is dropped twice as often",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/grouped_convolutions.py",
        "shards = mesh.split_dimension(axes, rank + 1, 0)",
        "shards = mesh.split_dimension(axes[:1], rank + 1, 0)",
        (f"{_REWRITES}::test_right_on_a_mesh",),
        "the kernel's gradient lacks the parts of the second axis of the batch",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/grouped_convolutions.py",
        "axes = mesh.dividing(images.shape.dimensions[batch])",
        "axes = [axis for axis, size in mesh.sizes.items() if size > 1]",
        (f"{_REWRITES}::test_grouped_convolutions_of_any_batch",),
        "a batch that does not divide is cut all the same",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/uneven_scatters.py",
        "_padded(editor, indices, rows[0], size, -1)",
        "_padded(editor, indices, rows[0], size, 0)",
        (f"{_REWRITES}::test_segments_of_every_reduction",),
        "padding of a scatter lands in row 0",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/uneven_scatters.py",
        "if all(indices.shape.dimensions[d] % mesh.devices == 0 for d in rows):",
        "if any(indices.shape.dimensions[d] % mesh.devices == 0 for d in rows):",
        (f"{_REWRITES}::test_uneven_scatters_of_several_dimensions",),
        "a scatter of which one dimension of rows divides is left as it is",
        survives="Of 84 scatters with several dimensions of rows, on four meshes, none "
        "is wrong without the rewrite: it is a caution.",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/uneven_scatters.py",
        "if _is_split(indices, numbers.index_vector_dim):",
        "if False:",
        (f"{_REWRITES}::test_small_programs_that_the_fuzzer_found",),
        "index vectors of a scatter stay split",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/idle_gaps.py",
        "dimension.interior_padding and size == 1",
        "dimension.interior_padding and size == 0",
        (f"{_REWRITES}::test_small_programs_that_the_fuzzer_found",),
        "the gradient of a slice of one row is on every device",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/windows.py",
        "_is_grouped(old) or (one_axis and _is_plain(old))",
        "_is_grouped(old) or _is_plain(old)",
        (_RIGHT,),
        "convolutions over split images are wrong again on meshes of two axes",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/windows.py",
        "if window.size > window.stride",
        "if window.size < window.stride",
        (_RIGHT,),
        "the gradient of overlapping maxima is wrong again",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/transforms.py",
        "if rank > len(old.fft_length):",
        "if rank >= len(old.fft_length):",
        (f"{_EDITING}::test_a_transform_over_all_dimensions_splits_none",),
        "a dimension that is transformed is split",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/shardings.py",
        "                size //= count\n",
        "",
        (f"{_REWRITES}::test_grouped_convolutions_of_any_batch",),
        "axes are taken that divide a dimension one by one, and not together",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/shardings.py",
        "devices.transpose([names.index(name) for name in [*used, *unused]])",
        "devices.transpose([names.index(name) for name in [*unused, *used]])",
        (f"{_EDITING}::test_shards_are_where_jax_puts_them",),
        "shards of a manual region are on the devices of copies",
    ),
    Mutant(
        "gshard_tf/hlo/rewrites/editing.py",
        "computation.root_id = instead.get(computation.root_id, computation.root_id)",
        "pass",
        (f"{_EDITING}::test_what_is_replaced_may_be_the_result",),
        "a computation returns the instruction that was replaced",
    ),
)
