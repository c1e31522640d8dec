"""SimDiff depth pruning, a room for each notebook: capture, criterion, pruning, recovery, speed, comparison.

Below them lie `run` (one model, one text, one set of settings), `models`, `text` and `engine`; imports point
down only. docs/architecture.md says which notebook opens which room.
"""

import warnings

__version__ = "0.1.0"

# Text bars serve a terminal and a notebook alike; tqdm would ask for ipywidgets in every notebook.
warnings.filterwarnings("ignore", message="IProgress not found")


class SimDiffError(ValueError):
    """Bad input or an impossible request; the message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the sentence is all a reader needs."""
        return [f"SimDiffError: {self}"]


def one_line(error: BaseException) -> str:
    """What a library's error says, as one line for our own sentence."""
    return " ".join(str(error).split())


def require(condition: object, sentence: str) -> None:
    """Refuse in a sentence what does not hold."""
    if not condition:
        raise SimDiffError(sentence)
