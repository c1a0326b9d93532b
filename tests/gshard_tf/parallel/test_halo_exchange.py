"""What devices need of each other, against a search through all elements."""

import random

from gshard_tf.parallel.halo_exchange import Shares, Window


def _draw(rng):
    spread = rng.choice([1, 1, 2, 3])
    size, dilation = rng.randint(1, 6), rng.randint(1, 3)
    inputs, outputs = rng.randint(1, 30), rng.randint(1, 30)
    stride = 1 if spread > 1 else rng.randint(1, 4)
    return Window(size, stride, dilation, rng.randint(0, 8), inputs, outputs, spread)


def _seen(window, output):
    """The elements of the image that an output sees."""
    at = [
        output * window.stride - window.before + k * window.dilation
        for k in range(window.size)
    ]
    return {i // window.spread for i in at if i % window.spread == 0}


def test_what_windows_see_is_held_or_received():
    rng = random.Random(0)
    for _ in range(500):
        window, n = _draw(rng), rng.randint(2, 8)
        shares = Shares(window, n)
        before, after = shares.halo()
        for device in range(n):
            own = range(device * shares.made, (device + 1) * shares.made)
            begin = device * shares.held + shares.begins()[device]
            for output in own:
                if output >= window.outputs:
                    continue
                for element in _seen(window, output):
                    # In what the device cuts out of its part with halos.
                    assert begin <= element < begin + shares.needed
                    assert -before <= element - device * shares.held
                    assert element - device * shares.held < shares.held + after
                    if 0 <= element < window.inputs:
                        sender = element // shares.held
                        pairs = shares.receivers(sender - device)
                        assert sender == device or (sender, device) in pairs


def test_nothing_is_sent_that_no_window_spans():
    rng = random.Random(1)
    for _ in range(500):
        window, n = _draw(rng), rng.randint(2, 8)
        shares = Shares(window, n)
        for distance in range(1 - n, n):
            for sender, device in shares.receivers(distance):
                outputs = range(
                    device * shares.made,
                    min((device + 1) * shares.made, window.outputs),
                )
                spread, stride = window.spread, window.stride
                first = outputs[0] * stride - window.before
                last = first + window.reach(len(outputs)) - 1
                span = range(first // spread, last // spread + 1)
                held = range(sender * shares.held, (sender + 1) * shares.held)
                assert set(span) & set(held)
