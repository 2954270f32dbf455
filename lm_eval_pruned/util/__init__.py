"""Files, tables, figures, progress and the collector: what every room may use."""
