"""Sharding of tensors: meshes, axis rules, annotations and layouts."""

from gshard_tf.compat.versions import check

# All that uses TensorFlow stands on this folder.
check()
