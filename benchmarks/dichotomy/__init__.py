"""What ``docs/make_dichotomy.py`` measures, collects and writes: the page of the dichotomy."""
