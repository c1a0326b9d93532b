"""Plans by the real TPU compiler."""

import importlib.util

import pytest
from processes import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)


@pytest.mark.slow
def test_a_model_on_slices_that_are_not_there():
    # One process: libtpu stays once it is loaded.
    printed = run_python(
        """
        import keras, tensorflow as tf
        import gshard_tf
        from gshard_tf.planning.chips import CHIPS, find_topology
        from keras_layers import EncoderBlock, MoELayer, TokenEmbedding
        from keras_layers import VocabularyProjection

        for name in ("v5:2x2", "v5e:3x5", "v3:7x7"):
            try:
                find_topology(name)
            except ValueError as error:
                print(error)
        for chip in CHIPS.values():
            for shape in chip.slices:
                find_topology(f"{chip.name}:{shape}")
        print("all slices known")

        def moe(hidden):
            def build():
                inputs = keras.Input((64, 128))
                x = keras.layers.Dense(128)(inputs)
                x = x + MoELayer(8, hidden, seed=0, name="moe")(x)
                model = keras.Model(inputs, x, name="model")
                model.compile("adam", "mse")
                return model
            return build

        x = tf.TensorSpec([8, 64, 128], tf.float32)
        plan = gshard_tf.plan(moe(256), "v5e:2x4", batch=(x, x), cache=False)
        print(plan.fits, plan.count("all-to-all"))
        print(plan.count("all-to-all", "model/moe"))
        print(plan.count("all-gather"), plan.reshards, plan.flops_ratio < 1.05)
        print(plan.memory.capacity, plan.time.roofline > 0)

        def wide():
            layers = [keras.layers.Dense(32768, use_bias=False) for _ in range(4)]
            model = keras.Sequential(layers)
            model.compile("adam", "mse")
            return model

        x = tf.TensorSpec([8, 32768], tf.float32)
        plan = gshard_tf.plan(wide, "v5e:2x4", batch=(x, x), cache=False)
        print(plan.fits, plan.memory, plan.out_of_memory.needed > 12 * 32768**2 * 4)
        print(any("fsdp" in advice for advice in plan.advice))
        # Arguments alone are too much, so the compiler names nothing.
        oom = plan.out_of_memory
        print(oom.as_written, oom.buffers[0].shape, "dense" in oom.buffers[0].layer)
        print("whole, as written" in str(plan))
        rules = gshard_tf.AxisRules({"batch": "expert"}, fsdp="expert")
        plan = gshard_tf.plan(wide, "v5e:2x4", None, rules, (x, x), cache=False)
        print(plan.state_bytes(per_core=True) < 7e9, plan.fits)

        x = tf.TensorSpec([8, 64, 128], tf.float32)
        for topology in ("v3:2x2", "v4:2x2x2", "v5p:2x2x2", "v6e:2x4"):
            plan = gshard_tf.plan(moe(256), topology, batch=(x, x), cache=False)
            print(topology, plan.fits, plan.count("all-to-all"))

        def blocks():
            ids = keras.Input((64,), dtype="int32")
            x = TokenEmbedding(512, 64)(ids)
            for i in range(2):
                x = EncoderBlock(8, 8, 256, dropout=0.0, seed=i)(x)
            model = keras.Model(ids, VocabularyProjection(512)(x))
            model.compile(
                "adam",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
            return model

        ids = tf.TensorSpec([8, 64], tf.int32)
        rules = gshard_tf.AxisRules({"batch": "x"}, fsdp="x", fsdp_min_bytes=1024)
        plan = gshard_tf.plan(
            blocks, "v5e:2x4", {"x": 8}, rules, (ids, ids), cache=False
        )
        split = [w for w in plan.weights if w.rule.startswith("fsdp")]
        print(plan.count("all-gather") == sum(w.role == "weight" for w in split))
        print(plan.count("reduce-scatter"), plan.count("all-reduce"))

        class Loop(keras.layers.Layer):
            def __init__(self, goes_on):
                super().__init__(name="loop")
                self.goes_on = goes_on

            def call(self, x):
                def body(i, x):
                    x = gshard_tf.annotate(tf.transpose(x), ("batch", None))
                    return i + 1, gshard_tf.annotate(tf.tanh(x), ("batch", None))

                first = tf.constant(0, tf.int64)
                return tf.while_loop(
                    self.goes_on, body, (first, x), maximum_iterations=9
                )[1]

        x = tf.TensorSpec([64, 64], tf.float32)
        for goes_on in (lambda i, x: i < 7, lambda i, x: x[0, 0] < 0.5):
            def turning():
                inputs = keras.Input([64], batch_size=64)
                return keras.Model(inputs, Loop(goes_on)(inputs), name="model")

            plan = gshard_tf.plan(
                turning, "v5e:2x4", {"x": 8}, rules, x, "predict", cache=False
            )
            print(plan.count("all-to-all"), plan.complaints)
        """
    )
    lines = printed.strip().split("\n")
    assert "tpu7x:2x2x2. Is it v5p?" in lines[0]  # of a like name
    assert "knows: v5e:4x4, v5e:" in lines[1]
    assert "knows: v3:8x8, v3:" in lines[2]
    assert lines[3] == "all slices known"
    assert lines[4:6] == ["True 4", "4"]
    assert lines[6] == "0 [] True"
    assert lines[7] == f"{16.0 * 2**30} True"
    assert lines[8] == "False None True"
    assert lines[9] == "True"
    assert lines[10] == "True f32[32768,32768] True"
    assert lines[11] == "True"
    # Spread over the axis, the same model fits.
    assert lines[12] == "True True"
    # The other chips.
    assert [line.split()[1:] for line in lines[13:17]] == [["True", "4"]] * 4
    # A gather of each split weight, though the compiler overlaps some with several
    # products; and their gradients are added up and split in one fusion.
    assert lines[17:19] == ["True", "1 1"]
    # A counter of 64 bits, which the compiler takes apart; and no counter at all.
    assert lines[19] == "7 []"
    assert lines[20].startswith('1 ["How often the loops in model/loop turn') or (
        lines[20].startswith("1 ['How often the loops in model/loop turn")
    )
