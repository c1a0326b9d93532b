"""A small server for an exported translator, where there is no TensorFlow Serving."""
