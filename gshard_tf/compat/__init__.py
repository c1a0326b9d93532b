"""What the package uses of TensorFlow, Keras and XLA that they do not promise."""
