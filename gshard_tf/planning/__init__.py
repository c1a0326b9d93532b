"""Planning: what a model would need and do on hardware that is not there."""
