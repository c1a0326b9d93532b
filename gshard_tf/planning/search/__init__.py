"""Search: the layout of a model on a slice that the plans' estimates prefer."""
