"""Logits of many positions, a chunk at a time: never those of a batch times a large vocabulary at once."""

from collections.abc import Iterator

from torch import Tensor

from simdiff_utils.engine.decoder import Decoder

CHUNK = 256  # positions whose logits are held at once
_ROWS = 8  # of them, those whose float32 logits stay in a processor's cache while they are worked on


def logits_in_chunks(decoder: Decoder, hidden: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Logits of states as the last layer leaves them, and what belongs to the same positions.

    Each position is a sequence of its own: together they may be more than the model has positions.

    Args:
        hidden: states [n, d].
        others: tensors [n, ...], on any device.

    Yields:
        logits [up to `CHUNK`, vocabulary], and as many rows of each other tensor.
    """
    chunks = zip(*(tensor.split(CHUNK) for tensor in (hidden, *others)), strict=True)
    for states, *beside in chunks:
        yield decoder.logits(states[:, None])[:, 0], *beside


def rows_in_cache(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A chunk's logits [n, vocabulary] and what belongs to the same positions, a few rows at a time.

    On a processor as many as its cache holds in float32, elsewhere the whole chunk: there every launch costs.
    """
    n_rows = _ROWS if logits.device.type == "cpu" else CHUNK
    return zip(*(tensor.split(n_rows) for tensor in (logits, *others)), strict=True)
