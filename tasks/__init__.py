"""Task groups that this package adds to lm-evaluation-harness."""
