"""``lm-eval-pruned check``: results held against a committed baseline, for CI."""
