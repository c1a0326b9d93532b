"""Keras 3, Keras 2 and the TF Model Garden on a mesh, against each on one device."""
