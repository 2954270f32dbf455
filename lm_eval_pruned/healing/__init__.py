"""Healing: training a pruned model again, to recover some of what the cut cost."""
