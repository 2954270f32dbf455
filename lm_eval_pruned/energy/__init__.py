"""Joules: a meter, windows, and what they read."""
