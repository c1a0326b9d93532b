"""Positions in `dataset.cache(FILE)`: a sentence where the process used to die."""

import json

import pytest
import tensorflow as tf
from processes import run_python

import gshard_tf
from gshard_tf.checkpoints import dataset_caches


def numbers(file, element=lambda x: x):
    dataset = tf.data.Dataset.range(40).map(element).cache(str(file))
    return dataset.shuffle(4, seed=1).repeat().batch(4)


def take(data, count):
    return [value.numpy().tolist() for value in data.dataset.take(count)]


def saved_after(file, batches):
    """(A position, the three batches behind it.)"""
    data = gshard_tf.ResumableDataset(numbers(file))
    take(data, batches)
    return data.state(), take(data, 3)


# Each case in a process of its own, which used to die in most of them. (TensorFlow is
# loaded once; nothing is run in it before the forks.)
CASES = """
import json, os, pathlib, tempfile
import tensorflow as tf
import gshard_tf
from gshard_tf.checkpoints.manager import CheckpointManager

def numbers(element=lambda x: x):
    dataset = tf.data.Dataset.range(40).map(element).cache("c")
    return dataset.shuffle(4, seed=1).repeat().batch(4)

def fill(element):
    for _ in numbers(element).take(12):
        pass

def remove(*patterns):
    for pattern in patterns:
        for path in list(pathlib.Path().glob(pattern)):
            path.unlink()

def cut(name, size):
    with open(name, "r+b") as file:
        file.truncate(size)

damages = {
    "absent": lambda: remove("c.*"),
    "no index": lambda: remove("c.index"),
    "no data": lambda: remove("c.data*"),
    "half-written": lambda: [remove("c.*"), pathlib.Path("c_0.lockfile").touch()],
    "empty index": lambda: cut("c.index", 0),
    "cut index": lambda: cut("c.index", os.path.getsize("c.index") // 2),
    "integers of 32 bits": lambda: [
        remove("c.*"), fill(lambda x: tf.cast(x, tf.int32))
    ],
    "strings": lambda: [remove("c.*"), fill(tf.strings.as_string)],
    "pairs": lambda: [remove("c.*"), fill(lambda x: (x, x))],
}

def going_back(batches, damage):
    data = gshard_tf.ResumableDataset(numbers())
    iterator = iter(data.dataset)
    for _ in range(batches):
        next(iterator)
    state = data.state()
    for _ in range(12):
        next(iterator)  # Now it is whole in any case.
    data = gshard_tf.ResumableDataset(numbers())
    damages[damage]()
    data.restore(**state)
    next(iter(data.dataset))

def starting_again():
    fill(lambda x: x)
    dataset = tf.data.Dataset.range(40).cache("c").repeat()
    data = gshard_tf.ResumableDataset(dataset)
    next(iter(data.dataset))
    remove("c.*")
    data.restart()

def restoring_a_checkpoint():
    variable = tf.Variable(1.0)
    data = gshard_tf.ResumableDataset(numbers())
    iterator = iter(data.dataset)
    for _ in range(13):
        next(iterator)
    checkpoints = CheckpointManager("run")
    checkpoints.save({"model/x": variable}, 1, dataset=data)
    checkpoints.wait()
    variable.assign(2.0)
    remove("c.*")
    try:
        checkpoints.restore({"model/x": variable}, dataset=data)
    finally:
        assert variable.numpy() == 2.0 and data.batches_taken == 13

def result(case):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(tempfile.mkdtemp())
        try:
            case()
            said = "nothing was raised"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"died of signal {os.WTERMSIG(status)}"
    return said

results = {}
for damage in damages:
    results["read, " + damage] = result(lambda: going_back(13, damage))
for damage in ("empty index", "cut index", "strings"):
    results["written, " + damage] = result(lambda: going_back(3, damage))
results["restart"] = result(starting_again)
results["checkpoint"] = result(restoring_a_checkpoint)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    return json.loads(run_python(CASES).strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("read, absent", "there is no c.index"),
        ("read, no index", "there is no c.index"),
        ("read, no data", "c.data-00000-of-00001; No such file"),
        ("read, half-written", "there is no c.index"),
        ("read, empty index", "file is too short"),
        ("read, cut index", "not an sstable"),
        ("read, integers of 32 bits", "expected dtype int64"),
        ("read, strings", "expected dtype int64"),
        ("read, pairs", "more components than 1"),
        ("written, empty index", "file is too short"),
        ("written, cut index", "not an sstable"),
        ("written, strings", "expected dtype int64"),
        ("restart", "there is no c.index"),
        ("checkpoint", "there is no c.index"),
    ],
)
def test_a_cache_that_cannot_be_read(results, case, found):
    message = (
        "ValueError: The files of dataset.cache('c') must be those of the position"
    )
    assert results[case].startswith(message), results[case]
    assert found in results[case]
    assert "position='count'" in results[case]


@pytest.mark.parametrize("batches", [1, 3, 13])
@pytest.mark.parametrize("name", ["c", "[c]*"])
def test_a_cache_that_was_kept(tmp_path, batches, name):
    first = gshard_tf.ResumableDataset(numbers(tmp_path / name))
    take(first, batches)
    state = first.state()
    first.require(state["iterator"])
    # One that was being written is whole by now.
    wanted = take(first, 12)[:3]
    second = gshard_tf.ResumableDataset(numbers(tmp_path / name))
    second.restore(**state)
    assert take(second, 3) == wanted


def test_a_cache_that_nothing_was_read_of(tmp_path):
    data = gshard_tf.ResumableDataset(numbers(tmp_path / "c"))
    state = data.state()
    wanted = take(data, 12)
    for path in tmp_path.iterdir():
        path.unlink()
    data.restore(**state)
    assert take(data, 12) == wanted


def test_a_count_needs_no_file(tmp_path):
    state, wanted = saved_after(tmp_path / "c", 13)
    for path in tmp_path.iterdir():
        path.unlink()
    data = gshard_tf.ResumableDataset(numbers(tmp_path / "c"), position="count")
    data.restore(state["batches"], None)
    assert take(data, 3) == wanted


@pytest.mark.parametrize("order", [(4, 400), (400, 4)])
def test_one_cache_is_read_and_one_is_written(tmp_path, order):
    def make():
        parts = [
            tf.data.Dataset.range(size).cache(str(tmp_path / f"of{size}")).repeat()
            for size in order
        ]
        return tf.data.Dataset.zip(*parts).batch(2)

    def going_on(count):
        return [
            [part.numpy().tolist() for part in pair]
            for pair in data.dataset.take(count)
        ]

    data = gshard_tf.ResumableDataset(make())
    going_on(5)
    state, wanted = data.state(), going_on(2)
    assert not (tmp_path / "of400.index").exists()
    data.restore(**state)
    assert going_on(2) == wanted
    # The one that is read is needed; it is told which one that is.
    for path in tmp_path.glob("of4.*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"there is no .*of4\.index"):
        data.require(state["iterator"])


def test_a_shard_is_missing(tmp_path):
    data = gshard_tf.ResumableDataset(numbers(tmp_path / "[c]"))
    for batches in (3, 3, 7):
        take(data, batches)
        state = data.state()
    data.require(state["iterator"])
    (tmp_path / "[c].data-00001-of-00003").unlink()
    with pytest.raises(ValueError, match="there is only .*-00000-of-.*-00002-of-"):
        data.require(state["iterator"])


def test_a_name_that_is_a_pattern(tmp_path):
    data = gshard_tf.ResumableDataset(numbers(tmp_path / "[c]"))
    take(data, 13)
    state = data.state()
    (tmp_path / "[c].index").write_bytes(b"")
    with pytest.raises(ValueError, match="file is too short"):
        data.require(state["iterator"])


def test_a_dataset_too_large_to_look_into(tmp_path, monkeypatch):
    state, _ = saved_after(tmp_path / "c", 13)
    monkeypatch.setattr(dataset_caches, "file_caches", lambda _: None)
    data = gshard_tf.ResumableDataset(numbers(tmp_path / "c"))
    with pytest.raises(ValueError, match="more than 2 GB"):
        data.restore(**state)
