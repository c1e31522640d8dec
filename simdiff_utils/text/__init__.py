"""Texts with a train, a validation and a test split, and their token blocks."""
