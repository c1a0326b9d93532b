"""The strategy loads nothing of what is built from it."""

from processes import run_python

HIGHER = ("planning", "export", "checkpoints", "verification", "callbacks", "tpu")


def test_the_strategy_loads_nothing_of_what_is_built_from_it():
    loaded = run_python(
        f"""
        import sys
        import gshard_tf.spmd.strategy
        higher = tuple("gshard_tf." + name for name in {HIGHER!r})
        print([name for name in sys.modules if name.startswith(higher)])
        """
    )
    assert loaded.strip() == "[]"
