"""Reads and rewrites HLO modules."""
