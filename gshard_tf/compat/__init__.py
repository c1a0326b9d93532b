"""Private APIs of TensorFlow, Keras and jax, each use with its reason."""
