"""The quick start runs, and its second half continues its first."""

import pytest

from gshard_examples import quickstart


@pytest.mark.slow  # its notebook runs by default
def test_the_quickstart_resumes_what_it_stopped(capsys):
    losses = quickstart.main(steps_per_epoch=10)
    # The two epochs that end after the stop.
    assert len(losses) == 2 and losses[1] < losses[0] < 4.16
    printed = capsys.readouterr().out
    assert "Stopped after step 25" in printed
    assert "Epoch 1/4" in printed.partition("Stopped")[0]
    assert "Epoch 1/4" not in printed.partition("Stopped")[2]
    assert "Resumed at step 24, trained to 40" in printed
    assert "expert,-,-" in printed
