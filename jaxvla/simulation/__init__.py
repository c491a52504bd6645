"""Programs that step environments, and what they are made of."""
