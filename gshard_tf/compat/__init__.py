"""What is private in TensorFlow, Keras and jax, and used all the same."""
