"""One Keras step as one partitioned program."""
