"""Joules: meters, windows, and the runs of the study."""
