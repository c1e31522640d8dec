"""SimDiff depth pruning: the functions the notebooks call.

Data flows one way: text -> capture -> criteria -> alpha -> methods -> evaluator -> surgery -> export ->
repair, recovery -> speed, bound -> comparison -> results -> plots. One engine, `decoder`, runs layers for all
of them, from memory or from disk (`weights`, `memory`). `stages` chains them and remembers what was computed;
everything else is usable alone.
"""

import warnings

__version__ = "0.1.0"

# Text bars serve a terminal and a notebook alike; tqdm would ask for ipywidgets in every notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
