"""The two tasks of the group ``pruned_demo``, with their data."""
