"""Where tensors go: meshes, axis rules, annotations and layouts."""
