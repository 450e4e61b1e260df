"""The parts of `compare_optimizers.py`."""
