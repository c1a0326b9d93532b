"""Test doubles that are installed with the package; not public API."""
