"""The parts of `physics_informed.py`."""
