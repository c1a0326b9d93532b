"""Layers, layouts and meshes: what the partitioner makes of each."""
