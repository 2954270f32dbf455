"""The group ``pruned_demo``, and the demo tasks with their data."""
