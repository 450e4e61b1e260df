"""Modules that several test files use."""
