"""Notebook 05: what fewer layers buy, and how near that is to what is possible."""
