"""Comparing runs, task by task."""
