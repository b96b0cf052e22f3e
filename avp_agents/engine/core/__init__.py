"""The engine's core."""
