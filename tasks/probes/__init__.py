"""The tasks of the group ``pruned_probes``, with their data."""
