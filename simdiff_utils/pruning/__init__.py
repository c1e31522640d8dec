"""Notebook 03: a checkpoint without the layers chosen."""
