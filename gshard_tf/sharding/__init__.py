"""Sharding of tensors: meshes, axis rules, annotations and layouts."""
