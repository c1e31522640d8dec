"""Run any subset of a model's decoder layers, from memory or from disk: the workbook's one engine."""
