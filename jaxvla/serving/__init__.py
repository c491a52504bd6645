"""Programs that answer chunk queries, and what they are made of."""
