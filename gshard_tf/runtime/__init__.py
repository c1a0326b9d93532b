"""Devices and processes of XLA's runtime."""
