"""What the core does on request only."""
