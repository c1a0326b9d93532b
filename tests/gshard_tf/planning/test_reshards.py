"""Requested communication, the rest, and what to do about the rest."""

import gshard_tf
from gshard_tf.hlo.collectives import Collective
from gshard_tf.planning.reshards import Annotation, ReshardClassifier


def classifier(rules, annotated=(), mesh=None):
    return ReshardClassifier(
        set(annotated),
        [],
        gshard_tf.create_mesh(mesh or {"data": 2, "data2": 4}),
        gshard_tf.AxisRules(rules),
    )


def gather(*dims, dimension=0):
    return Collective("all-gather", (("f32", dims),), 0, "", dimension=dimension)


def test_advice_names_the_logical_axis_of_the_rule():
    rules = {"heads": None, "batch": "data2", "group": "data"}
    of_data = classifier(rules).advice(gather(8, 4), "data", "einsum")
    assert "annotate the result of `einsum`" in of_data
    assert "gshard_tf.annotate(x, ('group', None))" in of_data
    of_data2 = classifier(rules).advice(gather(8, 4, dimension=1), "data2", "")
    assert "gshard_tf.annotate(x, (None, 'batch'))" in of_data2


def test_advice_over_several_axes_takes_the_first_rule_of_any():
    rules = {"heads": None, "batch": "data2", "group": "data"}
    text = classifier(rules).advice(gather(8, 4), "data+data2", "")
    assert "gshard_tf.annotate(x, ('batch', None))" in text


def test_advice_without_a_rule_names_the_mesh_axis():
    text = classifier({"heads": None, "group": "data2"}).advice(gather(8), "data", "")
    assert "gshard_tf.annotate(x, ('data',))" in text
    permute = Collective("collective-permute", (("f32", (8,)),), 0, "")
    text = classifier({"heads": None}).advice(permute, "data", "")
    assert text.startswith("Two layouts over 'data' meet.")


def test_an_annotation_around_a_layer_requests_its_exchange():
    exchange = Collective("all-to-all", (("f32", (4, 8)),), 0, "")
    annotated = [Annotation("model/moe", elements=8 * 32, shards=8)]
    judged = classifier({"batch": "data"}, annotated)
    assert judged.is_requested(exchange, "model/moe/experts")
    assert not judged.is_requested(exchange, "model/attention")
    assert judged.is_requested(Collective("all-reduce", (), 0, ""), "model/attention")
