"""A simulated TPU slice: traces, partitions and runs its program on CPU devices."""
