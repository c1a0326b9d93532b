"""Compares a step on the mesh with the same step on one device."""
