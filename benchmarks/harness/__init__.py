"""Helpers of the benchmarks: command lines, timing, memory, the machine's name."""
