"""The paper's models, planned."""
