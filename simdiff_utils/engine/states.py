"""Hidden states on their way through a model: which sets of layers share them, and where they are kept."""

import tempfile
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simdiff_utils.assets import cache_dir
from simdiff_utils.files import check_disk


class HiddenStates:
    """Hidden states by (prefix, batch): in memory, or a file each in a folder that goes when the pass
    ends."""

    def __init__(self, on_disk: bool, n_bytes: int, device: torch.device | None) -> None:
        self._on_disk, self._n_bytes, self._device, self._kept = on_disk, n_bytes, device, {}

    def __enter__(self) -> "HiddenStates":
        if self._on_disk:
            root = cache_dir()
            root.mkdir(parents=True, exist_ok=True)
            check_disk(root, self._n_bytes, "what is kept of all samples on the way (SIMDIFF_CACHE moves it)")
            self._folder = tempfile.TemporaryDirectory(prefix="states-", dir=root)
            self._unused = (Path(self._folder.name) / str(number) for number in count())
        return self

    def __exit__(self, *_error: object) -> None:
        self._kept.clear()
        if self._on_disk:
            self._folder.cleanup()

    def put(self, key: tuple, hidden: Tensor) -> None:
        if self._on_disk:
            path = self._kept.get(key) or next(self._unused)
            save_file({"hidden": hidden.contiguous()}, path)
            self._kept[key] = path
        else:
            self._kept[key] = hidden if self._device is None else hidden.to(self._device)

    def get(self, key: tuple) -> Tensor:
        return load_file(self._kept[key])["hidden"] if self._on_disk else self._kept[key]

    def drop(self, key: tuple) -> None:
        kept = self._kept.pop(key)
        if self._on_disk:
            kept.unlink()


def split_prefixes(sets: tuple[frozenset[int], ...], layer_idx: int) -> tuple[set, set]:
    """The prefixes (layers left out before this one) that go through this layer, and those that go around
    it."""
    through, around = set(), set()
    for removed in sets:
        (around if layer_idx in removed else through).add(frozenset(i for i in removed if i < layer_idx))
    return through, around
