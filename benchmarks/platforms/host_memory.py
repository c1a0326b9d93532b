"""Host memory of a training process over the bytes of its own shards.

    python -m benchmarks.platforms.host_memory

One process of a run (`gshard_tf.initialize` reads the environment) trains one step of
a layer of experts, on CPU devices: so its shards are in host memory too, and a process
that held nothing else would have the ratio 1.
"""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np

import gshard_tf
from benchmarks.harness import memory
from keras_layers import MoELayer

MESH_DEVICES = 4


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def host_bytes_over_shards(processes: int, hidden_dim: int) -> dict[str, float]:
    """Runs so many processes; returns the largest ratio among them."""
    port = _free_port()
    common = {
        **os.environ,
        "GSHARD_COORDINATOR": f"127.0.0.1:{port}",
        "GSHARD_PROCESSES": str(processes),
        "HIDDEN_DIM": str(hidden_dim),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.platforms.host_memory"],
            env={**common, "GSHARD_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    texts = [process.communicate(timeout=1200)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(
            "All processes must end well. Received: exit codes "
            f"{[process.returncode for process in started]}"
        )
    # Only the first one writes.
    return json.loads(texts[0].splitlines()[-1])


def main() -> None:
    group = gshard_tf.initialize()
    gshard_tf.request_cpu_devices(MESH_DEVICES // group.count)
    keras.utils.set_random_seed(0)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": MESH_DEVICES}))
    small = _trained(strategy, 8)
    before = memory.resident()
    memory.reset_peak()
    model = _trained(strategy, int(os.environ["HIDDEN_DIM"]))
    peak, extra = memory.peak() - before, memory.resident() - before
    program = strategy.programs[-1]
    shards = sum(local for _, _, local in program.argument_bytes())
    shards *= MESH_DEVICES // group.count
    whole = sum(whole for _, whole, _ in program.argument_bytes())
    result = {
        "host_bytes_over_shards": round(extra / shards, 2),
        "peak_over_shards": round(peak / shards, 2),
        "beyond_shards_mb": round((extra - shards) / 1e6, 1),
        "shards_of_the_process_mb": round(shards / 1e6, 1),
        "whole_state_mb": round(whole / 1e6, 1),
    }
    print(json.dumps(result), flush=True)
    keras.backend.clear_session(free_memory=False)
    del model, small


def _trained(strategy: gshard_tf.SpmdStrategy, hidden_dim: int) -> keras.Model:
    """A model of 8 experts after one step."""
    x = np.zeros([8, 4, 256], "float32")
    with strategy.scope():
        inputs = keras.Input(x.shape[1:])
        layer = MoELayer(8, hidden_dim, seed=0)
        model = keras.Model(inputs, layer(inputs))
        model.compile("adam", "mse")
    model.fit(x, x, batch_size=len(x), verbose=0)
    return model


if __name__ == "__main__":
    main()
