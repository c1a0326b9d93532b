"""Sharded checkpoints: written shard by shard, restored onto any mesh."""
