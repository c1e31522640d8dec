"""SimDiff depth pruning: the functions the notebooks call.

Data flows one way: text -> capture -> criteria -> alpha -> surgery -> recovery -> speed -> results -> plots.
`stages` chains them and remembers what was computed; everything else is usable alone.
"""

import warnings

__version__ = "0.1.0"

# Text bars serve a terminal and a notebook alike; tqdm would ask for ipywidgets in every notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
