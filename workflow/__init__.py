"""Batch runs: the notebooks as a graph of files for Snakemake."""
