"""``lm-eval-pruned check``: results compared with a committed baseline, for CI."""
