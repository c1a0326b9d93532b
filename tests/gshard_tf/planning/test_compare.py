"""Two plans side by side."""

import dataclasses

import plan_samples

from gshard_tf.planning.compare import compare, rows


def row(a, b, name):
    [found] = [cells for n, *cells in rows(a, b) if n.strip() == name]
    return found


def test_ratios_are_of_the_second_to_the_first():
    a, b = plan_samples.moe(), plan_samples.giant()
    assert row(a, b, "cores") == ["128", "2,048", "16x"]
    assert row(b, a, "cores") == ["2,048", "128", "0.0625x"]
    assert row(a, b, "all-to-all") == ["805 MB", "2.42 GB", "3.00x"]
    assert row(a, b, "temporaries") == ["4.90 GB", "4.90 GB", "same"]
    assert row(a, b, "step time, at least") == ["1.36 s", "2.14 s", "1.58x"]
    text = compare(a, b)
    assert "A: lm, train, on v3:8x8 (expert=128): fits" in text
    assert "estimates, not measurements" in text


def test_what_is_not_known_is_no_zero():
    a, b = plan_samples.moe(), plan_samples.out_of_memory()
    assert row(a, b, "memory of a core") == ["8.69 GB", "47.1 GB", "5.43x"]
    for name in (
        "temporaries",
        "FLOPs of a core",
        "communication to a core",
        "all-to-all",
        "reshards not asked for",
        "step time, at least",
    ):
        first, second, ratio = row(a, b, name)
        assert (second, ratio) == ("-", "-"), name
        assert first != "-", name  # fmt: skip
    assert "OUT OF MEMORY" in compare(a, b)


def test_a_kind_that_only_one_has():
    a, b = plan_samples.moe(), plan_samples.two_axes()
    assert row(a, b, "reduce-scatter") == ["0 B", "64.0 MB", "-"]


def test_it_says_what_is_not_comparable():
    a = plan_samples.moe()
    assert "!" not in compare(a, a)
    text = compare(a, plan_samples.giant())
    assert "batches differ" in text
    assert "models differ" in text
    assert "modes" not in text
    other = dataclasses.replace(a, mode="predict", versions={"keras": "4"})
    text = compare(a, other)
    assert "different modes: train and predict" in text
    assert "different versions" in text
    assert "models differ" not in text
