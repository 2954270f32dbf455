"""The pure core: how many neurons, which ones, and slicing them out."""
