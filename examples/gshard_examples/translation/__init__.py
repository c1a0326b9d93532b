"""Translating a hundred languages into English, the GShard paper's own task.

This package's modules import TensorFlow only where they need it, so that preparing
a corpus or scoring a file costs no TensorFlow start-up.
"""
