"""Planning: compiles the step of a model for hardware you need not have."""
