"""Faults in what the cores of a TPU hold."""

from benchmarks.mutants.mutant import Mutant

_HERE = "tests/gshard_tf/tpu"
_ASSIGNMENT = f"{_HERE}/test_assignment.py"
_CONSTRUCTION = f"{_HERE}/test_construction.py"
_CORE_LAYOUTS = f"{_HERE}/test_core_layouts.py"
_INITIAL = f"{_HERE}/test_initial.py"
_SEMANTICS = f"{_HERE}/test_semantics.py"

MUTANTS = (
    Mutant(
        "gshard_tf/tpu/assignment.py",
        "itertools.accumulate(reversed(sizes), lambda a, b: a * b)",
        "itertools.accumulate(sizes, lambda a, b: a * b)",
        (_ASSIGNMENT,),
        "the first axis of a mesh gets the short ways that are the last one's",
    ),
    Mutant(
        "gshard_tf/tpu/assignment.py",
        "    if cores % mesh.size:\n",
        "    if cores < mesh.size:\n",
        (_ASSIGNMENT,),
        "a slice that is no whole number of meshes is taken",
    ),
    Mutant(
        "gshard_tf/tpu/assignment.py",
        "key=lambda box: (-box[3], max(box[:3]), [-n for n in box])",
        "key=lambda box: (box[3], max(box[:3]), [-n for n in box])",
        (_ASSIGNMENT,),
        "a replica takes one core of each chip",
    ),
    Mutant(
        "gshard_tf/tpu/core_layouts.py",
        "        for axis in unused:\n",
        "        for axis in unused[:1]:\n",
        (_CORE_LAYOUTS,),
        "on meshes of three axes a part of a weight lies on two cores",
    ),
    Mutant(
        "gshard_tf/tpu/core_layouts.py",
        "use = decision.use or decision.layout",
        "use = decision.use",
        (_CORE_LAYOUTS,),
        "a weight that the axes left over split is not gathered for its use",
    ),
    Mutant(
        "gshard_tf/tpu/initial.py",
        "rows = part(first.start * row, first.stop * row)",
        "rows = part(0, (first.stop - first.start) * row)",
        (_INITIAL,),
        "every core's part of a large weight begins as the first one's",
    ),
    Mutant(
        "gshard_tf/tpu/initial.py",
        "at_once = max(1, _CHUNK // row)",
        "at_once = 1 + _CHUNK",
        (_INITIAL,),
        "the host makes all of a weight to cut a part out of it",
    ),
    Mutant(
        "gshard_tf/tpu/random_parts.py",
        "return numbers[start - skipped * _GROUP :]",
        "return numbers[: stop - start]",
        (_INITIAL,),
        "a part that does not begin at a group of four is shifted",
    ),
    Mutant(
        "gshard_tf/tpu/random_parts.py",
        '"StatelessTruncatedNormalV2": 256,',
        '"StatelessTruncatedNormalV2": 1,',
        (_INITIAL,),
        "parts of truncated normals repeat each other",
    ),
    Mutant(
        "gshard_tf/tpu/random_parts.py",
        "np.array([total % 2**64, (total >> 64) % 2**64], np.uint64)",
        "np.array([total % 2**64, counter[1]], np.uint64)",
        (_INITIAL,),
        "the counter of random numbers loses its carry",
    ),
    Mutant(
        "gshard_tf/tpu/storage.py",
        "slice(i * n, (i + 1) * n) for i, n in zip(tile, sizes, strict=True)",
        "slice((p - 1 - i) * n, (p - i) * n)\n"
        "            for i, n, p in zip(tile, sizes, self.partitions, strict=True)",
        (_CONSTRUCTION,),
        "cores hold the parts in reversed order",
    ),
    Mutant(
        "gshard_tf/tpu/restoring.py",
        "            spec.slice_spec: tensor\n",
        "            spec.slice_spec: restored_tensors[0]\n",
        (_CONSTRUCTION,),
        "every core gets the first core's part back",
    ),
    Mutant(
        "gshard_tf/tpu/variables.py",
        "            if tile not in found:\n",
        "            if True:\n",
        (_CONSTRUCTION,),
        "a checkpoint reads every copy of a part, to write the last one",
        survives="The copies are equal; what is read too often is lost time alone.",
    ),
    Mutant(
        "gshard_tf/tpu/strategy.py",
        "tf.nest.map_structure(self._split_examples, (args, kwargs))",
        "(args, kwargs)",
        (f"{_SEMANTICS}::test_inputs_arrive_in_parts",),
        "every core is sent the whole batch of its replica",
    ),
)
