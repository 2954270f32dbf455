"""The study of arXiv 2512.22671 for any model: its options, what it takes, what it found, its page."""
