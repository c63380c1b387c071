"""What an embedding is worth, during a run and after it."""
