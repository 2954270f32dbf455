"""Model types that this package adds to lm-evaluation-harness."""
