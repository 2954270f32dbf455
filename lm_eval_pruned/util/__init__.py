"""Files, options, tables, figures and the user's cache: what every room may use."""
