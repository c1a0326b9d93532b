"""One process, eight virtual CPU devices, for every test that runs a mesh.

What needs another state of the process (jax already started, DTensor's device) runs
in a process of its own: see `processes.py`.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis

import gshard_tf

gshard_tf.request_cpu_devices(8)

# The first call of many a property compiles something.
hypothesis.settings.register_profile("gshard", deadline=None, print_blob=True)
hypothesis.settings.load_profile("gshard")
