"""Many configurations by many tasks."""
