"""Data sets of the Hugging Face hub: the one wrapper of `datasets.load_dataset`."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from simdiff_utils import SimDiffError, one_line

if TYPE_CHECKING:  # slow to import, and not needed by who stays with embedded or local text
    from datasets import Dataset, DatasetDict


def split_name(name: str) -> tuple[str, str | None] | None:
    """`org/name` or `org/name:config` as name and config; None where it cannot be a data set's name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return None
    name, _, config = name.partition(":")
    return name, config or None


def load_hub(name: str, config: str | None = None, hint: str = "", **options) -> "DatasetDict | Dataset":
    """What `datasets.load_dataset` gives; without a connection, at once, what the hub's local cache holds.

    Args:
        hint: what to do without the hub, for the sentence; "": the caller puts the error into one of its own.
        options: of `datasets.load_dataset`, such as split.

    Raises:
        SimDiffError: there is no such data set, it is gated, or the hub cannot be reached.
    """
    import datasets

    try:
        with _no_retries():
            return datasets.load_dataset(name, config, **options)
    except Exception as error:  # a dozen kinds, from no connection to no such config; all end the same way
        reason = one_line(error)[:200]
        if "gated" in reason:
            hint = "accept the licence on its page, then `hf auth login`"
        advice = f": check the name; {hint}." if hint else ""
        raise SimDiffError(f"the hub does not give {name} ({reason}){advice}") from error


@contextmanager
def _no_retries() -> Iterator[None]:
    """The hub as it is; where it cannot be reached, offline while the block lasts: no minute of retries."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    offline = any(before) or not _hub_answers()
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever client huggingface_hub uses
        return False
    return True
