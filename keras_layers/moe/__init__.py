"""Mixture of experts: the layer, its dispatchers, metrics and options."""
