"""Notebook 02: from the statistics of layers to the set that is removed (Eq. 5 to 9, the peers, the
searches)."""
