"""SimDiff depth pruning: the functions the notebooks call.

Data flows one way: text -> capture -> criteria -> alpha -> surgery -> recovery -> speed -> results -> plots.
`stages` chains them and remembers what was computed; everything else is usable alone.
"""

__version__ = "0.1.0"
