"""Files: atomic writes, and locks on folders."""
