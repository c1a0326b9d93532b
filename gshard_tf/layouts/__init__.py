"""Layouts as text and numbers: what needs neither TensorFlow nor devices."""
