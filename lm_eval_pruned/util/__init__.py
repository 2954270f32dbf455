"""Files, progress and the collector: what every room may use."""
