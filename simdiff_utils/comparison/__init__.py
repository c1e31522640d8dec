"""Notebook 06: every criterion under one protocol."""
