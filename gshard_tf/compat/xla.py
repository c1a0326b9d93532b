"""XLA's own options, which it names as it likes."""

# XLA's CPU compiler drops optimization barriers before it fuses, and so computes again
# what a barrier holds. Without that pass they stay to the end, and cost nothing there.
# On an upgrade, check that an `opt-barrier` is in the text of a compiled program: XLA
# ignores the name of a pass that it does not have.
_CPU = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(platform: str) -> dict[str, str]:
    """The options that programs are compiled with for a platform, such as "cpu"."""
    return dict(_CPU) if platform == "cpu" else {}
