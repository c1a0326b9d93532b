"""Layers' computations as manual regions, where the partitioner's own are costly."""
