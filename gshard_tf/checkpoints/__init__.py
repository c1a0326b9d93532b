"""Sharded checkpoints: written piece by piece, restored onto any mesh."""
