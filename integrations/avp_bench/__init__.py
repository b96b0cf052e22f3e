"""Benchmarks: what the engine costs on the machine at hand, measured side by side in one run."""
