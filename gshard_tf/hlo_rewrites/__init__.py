"""Changes of a lowered step that keep what it means."""
