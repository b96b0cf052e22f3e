"""Loading a model for the core."""
