"""Notebook 01: what every layer does to the calibration samples (Eq. 2 to 4)."""
