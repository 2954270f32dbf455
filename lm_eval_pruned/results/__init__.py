"""From results files to statistics, verdicts and reports."""
