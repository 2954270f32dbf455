"""The study of arXiv 2512.22671 for any model: what it consists of, its cost, and its page."""
