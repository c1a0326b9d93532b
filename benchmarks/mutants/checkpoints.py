"""Faults in writing, keeping and restoring checkpoints."""

from benchmarks.mutants.mutant import Mutant

_HERE = "tests/gshard_tf"
_BUNDLE = f"{_HERE}/checkpoints/test_tensor_bundle.py"
_CACHES = f"{_HERE}/checkpoints/test_dataset_caches.py"
_DATA = f"{_HERE}/checkpoints/test_dataset.py"
_DURABLE = f"{_HERE}/checkpoints/test_durability.py"
_MANAGER = f"{_HERE}/checkpoints/test_manager.py"
_MATCHING = f"{_HERE}/checkpoints/test_matching.py"
_RESTORE = f"{_HERE}/checkpoints/test_restore.py"
_RESUME = f"{_HERE}/callbacks/test_resume.py"
_SNAPSHOT = f"{_HERE}/checkpoints/test_snapshot.py"
_STATE = f"{_HERE}/checkpoints/test_training_state.py"

MUTANTS = (
    Mutant(
        "gshard_tf/io/atomic_files.py",
        "        os.fsync(file.fileno())\n",
        "",
        (f"{_DURABLE}::test_all_is_on_the_disk_before_it_has_its_name",),
        "a manifest has its name before it is on the disk",
    ),
    Mutant(
        "gshard_tf/io/atomic_folders.py",
        "        os.rename(partial, path)\n        sync(path.parent)\n",
        "        os.rename(partial, path)\n",
        (f"{_DURABLE}::test_all_is_on_the_disk_before_it_has_its_name",),
        "a checkpoint that was announced is gone after a power cut",
    ),
    Mutant(
        "gshard_tf/checkpoints/writer.py",
        "    for path in paths:\n        sync(path)\n",
        "",
        (f"{_DURABLE}::test_all_is_on_the_disk_before_it_has_its_name",),
        "arrays have their name before they are on the disk",
    ),
    Mutant(
        "gshard_tf/checkpoints/writer.py",
        "in tensor_bundle.files(part):",
        "in tensor_bundle.files(part)[:0]:",
        (f"{_DURABLE}::test_a_part_is_on_the_disk_before_its_process_says_so",),
        "a process says that its part is written before it is on the disk",
    ),
    Mutant(
        "gshard_tf/checkpoints/writer.py",
        'writes the manifest last."""\n',
        'writes the manifest last."""\n    manifest.write(partial)\n',
        (f"{_DURABLE}::test_all_is_on_the_disk_before_it_has_its_name",),
        "the manifest is written before what it vouches for",
    ),
    Mutant(
        "gshard_tf/checkpoints/tensor_bundle.py",
        "region[axis] = (start + at, count)",
        "region[axis] = (at, count)",
        (f"{_BUNDLE}::test_any_part_of_an_array_that_two_devices_wrote",),
        "slices of a piece are written as if the piece began at 0",
    ),
    Mutant(
        "gshard_tf/checkpoints/tensor_bundle.py",
        "spec = slice_spec(shape, region)",
        'spec = ""',
        (f"{_BUNDLE}::test_any_part_of_an_array_that_two_devices_wrote",),
        "a device is given all of an array for its part",
    ),
    Mutant(
        "gshard_tf/checkpoints/tensor_bundle.py",
        'f"{start},{size}" for start, size in region',
        'f"{start},{start + size}" for start, size in region',
        (f"{_BUNDLE}::test_slices_are_small_and_make_up_the_array",),
        "slices are named by their ends, not by their sizes",
    ),
    Mutant(
        "gshard_tf/checkpoints/manifest.py",
        'sound = digest == document["sha256"]',
        "sound = True",
        (f"{_MANAGER}::test_every_flipped_bit_is_noticed",),
        "a manifest with a flipped bit is believed",
    ),
    Mutant(
        "gshard_tf/checkpoints/manifest.py",
        "for name, digest in manifest.digests.items():",
        "for name, digest in ():",
        (f"{_MANAGER}::test_every_flipped_bit_is_noticed",),
        "an index with a flipped bit is believed",
    ),
    Mutant(
        "gshard_tf/checkpoints/matching.py",
        "source = matched.expand(template)",
        "source = template",
        (f"{_MATCHING}::test_groups_of_a_pattern_are_put_into_the_name",),
        "groups of a pattern are not put into the name that it stands for",
    ),
    Mutant(
        "gshard_tf/checkpoints/matching.py",
        "array.shape == shape[1:]",
        "array.shape == shape[:-1]",
        (f"{_RESTORE}::test_upcycling_a_dense_checkpoint",),
        "arrays are repeated along the last dimension, not over the experts",
    ),
    Mutant(
        "gshard_tf/checkpoints/matching.py",
        "left = [name for name in arrays if name not in taken]",
        "left = []",
        (f"{_MANAGER}::test_a_checkpoint_of_another_model",),
        "a checkpoint of a larger model is taken for this one's",
    ),
    Mutant(
        "gshard_tf/checkpoints/matching.py",
        "if array.dtype != dtype:",
        "if False:",
        (f"{_MATCHING}::test_another_type_is_a_mismatch",),
        "arrays of another type are taken",
    ),
    Mutant(
        "gshard_tf/checkpoints/matching.py",
        "any(re.fullmatch(pattern, name) for pattern in patterns)",
        "any(re.match(pattern, name) for pattern in patterns)",
        (f"{_MATCHING}::test_patterns_are_of_whole_names",),
        "a pattern for what may be missing allows all that begins so",
    ),
    Mutant(
        "gshard_tf/checkpoints/training_state.py",
        'self.renamed[part] = f"{base}_{count}" if count else base',
        "self.given[part] = part",
        (f"{_STATE}::test_names_are_the_same_wherever_a_model_is_made",),
        "names are those of Keras's counter, which differ by process",
    ),
    Mutant(
        "gshard_tf/checkpoints/training_state.py",
        "key=lambda pair: -len(pair[0])",
        "key=lambda pair: len(pair[0])",
        (f"{_STATE}::test_slots_go_by_the_whole_name_of_their_weight",),
        "a slot goes by a weight whose name begins like its own weight's",
    ),
    Mutant(
        "gshard_tf/checkpoints/training_state.py",
        "    while unique in state:\n",
        "    while False:\n",
        (f"{_STATE}::test_weights_of_one_name_are_told_apart",),
        "of two variables of one name only the last is saved",
    ),
    Mutant(
        "gshard_tf/checkpoints/snapshot.py",
        "copies = aligned_copies([view.value for view in views])",
        "copies = [view.value for view in views]",
        (f"{_SNAPSHOT}::test_pieces_are_copies",),
        "what is written in the background is the memory that the next step reuses",
    ),
    Mutant(
        "gshard_tf/checkpoints/snapshot.py",
        "            elif is_chief:\n",
        "            else:\n",
        (f"{_SNAPSHOT}::test_what_all_processes_have_is_for_the_chief",),
        "every process writes what all of them have",
    ),
    Mutant(
        "gshard_tf/runtime/device_arrays.py",
        "if shard.replica_id == 0:",
        "if shard.replica_id >= 0:",
        (f"{_MANAGER}::test_a_save_has_the_values_of_its_moment",),
        "pieces that several devices hold are written several times",
    ),
    Mutant(
        "gshard_tf/sharding/regions.py",
        "bounds.append((start, stop - start))",
        "bounds.append((start, stop))",
        (f"{_SNAPSHOT}::test_every_piece_comes_once",),
        "regions have their ends for sizes",
    ),
    Mutant(
        "gshard_tf/sharding/regions.py",
        "start = -buffer.ctypes.data % ALIGNMENT",
        "start = 0",
        (f"{_SNAPSHOT}::test_pieces_are_copies",),
        "copies are not where TensorFlow takes memory as it is, and are copied again",
    ),
    Mutant(
        "gshard_tf/checkpoints/step_folders.py",
        "if _HIDDEN.fullmatch(path.name)]",
        'if path.name.startswith(".")]',
        (f"{_MANAGER}::test_hidden_folders_of_others_stay",),
        "hidden folders of others are removed with what killed runs left",
    ),
    Mutant(
        "gshard_tf/checkpoints/step_folders.py",
        "    os.rename(path, hidden)\n    sync(folder)\n    shutil.rmtree(hidden)\n",
        "    shutil.rmtree(path)\n",
        (f"{_DURABLE}::test_half_of_a_removed_checkpoint_is_none",),
        "a death while a checkpoint is removed leaves half of it under its name",
    ),
    Mutant(
        "gshard_tf/checkpoints/retention.py",
        'min if mode == "min" else max',
        'max if mode == "min" else min',
        (f"{_MANAGER}::test_the_newest_and_the_best_are_kept",),
        "the worst checkpoint is kept for the best",
    ),
    Mutant(
        "gshard_tf/checkpoints/retention.py",
        "sound[-max_to_keep:]",
        "sound[-max_to_keep - 1 :]",
        (f"{_MANAGER}::test_the_newest_and_the_best_are_kept",),
        "one checkpoint more than asked for is kept",
    ),
    Mutant(
        "gshard_tf/checkpoints/restore.py",
        "        apply.append(stage(state[name], read))\n",
        "        stage(state[name], read)()\n",
        (f"{_MANAGER}::test_nothing_changes_when_a_later_array_is_damaged",),
        "variables change before all of the checkpoint was found to be whole",
    ),
    Mutant(
        "gshard_tf/checkpoints/restore.py",
        "        read = array_reader(folder, manifest, source)\n",
        '        if name.endswith("/velocity"):\n            continue\n'
        "        read = array_reader(folder, manifest, source)\n",
        (f"{_RESUME}::test_going_on_is_exact[3]",),
        "a restore leaves the second moments of Adam as they are",
    ),
    Mutant(
        "gshard_tf/checkpoints/restore.py",
        "        corrupt.add(candidate)\n",
        "",
        (f"{_DURABLE}::test_damaged_checkpoints_do_not_push_sound_ones_out",),
        "damaged checkpoints count among those that are kept, and sound ones go",
    ),
    Mutant(
        "gshard_tf/callbacks/checkpoint.py",
        "            self._save(epoch + 1, 0, logs)\n",
        "            self._save(epoch, 0, logs)\n",
        (f"{_RESUME}::test_a_run_that_is_done_does_nothing",),
        "a run that goes on trains its last epoch again",
    ),
    Mutant(
        "gshard_tf/callbacks/checkpoint.py",
        "crossed = self.save_every and self.step // self.save_every > (",
        "crossed = self.save_every and self.step // self.save_every >= (",
        (f"{_RESUME}::test_going_on_is_exact[1]",),
        "a checkpoint is written after every step",
    ),
    Mutant(
        "gshard_tf/callbacks/checkpoint.py",
        "            self._restore_metrics(self.restored)\n",
        "            pass\n",
        (f"{_RESUME}::test_going_on_is_exact[3]",),
        "the metrics of an epoch that goes on are those of its rest",
    ),
    Mutant(
        "gshard_tf/checkpoints/dataset.py",
        "for batch in range(self.batches_taken, batches):",
        "for batch in range(self.batches_taken + 1, batches):",
        (f"{_DATA}::test_going_on",),
        "a run that counts batches trains on the last one again",
    ),
    Mutant(
        "gshard_tf/checkpoints/dataset.py",
        "options.experimental_optimization.inject_prefetch = False",
        "options.experimental_optimization.inject_prefetch = True",
        (f"{_RESUME}::test_going_on_is_exact[3]",),
        "batches are read ahead of the step, and lost",
    ),
    Mutant(
        "gshard_tf/checkpoints/dataset_caches.py",
        "if any(len(numbers) == count for count, numbers in parts.items()):",
        "if any(len(numbers) >= 1 for count, numbers in parts.items()):",
        (f"{_CACHES}::test_a_shard_is_missing",),
        "a cache that lacks a file is taken for whole, and the process dies",
    ),
)
