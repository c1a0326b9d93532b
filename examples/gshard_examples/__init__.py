"""Examples: each runs by one command."""
