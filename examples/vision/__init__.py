"""Data, networks, optimizers and results of `classify_images.py`, a room for each."""
