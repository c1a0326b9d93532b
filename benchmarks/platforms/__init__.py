"""Platforms: operations and layers by platform, and the overhead of `fit`."""
