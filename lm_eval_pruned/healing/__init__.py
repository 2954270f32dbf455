"""Healing: training a pruned model again, so that it takes back some of what the cut cost."""
