"""Notebook 04: healing a pruned model, by arithmetic at the cut or by training."""
