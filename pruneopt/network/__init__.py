"""What the user hands in: batches, leaves, and calls of their functions."""
