"""What the benchmarks share: command lines, timing, memory, the machine's name."""
