"""Messages and contexts in, token ids out."""
