"""Benchmark tasks by lm-eval, in process, for many sets of removed layers at once."""
