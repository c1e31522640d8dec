"""What a checkpoint folder's files say of themselves, before any weight is read: headers, names, pointers."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from simdiff_utils import SimDiffError

_POINTER = b"version https://git-lfs"  # what a clone without git-lfs holds in the place of a large file


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: dtype and shape as the header states them, and from which byte of the
    file to which."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.start

    @property
    def n_parameters(self) -> int:
        return prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the file's order; nothing but the header is read."""
    label = f"{file.name} in {file.parent.name}"
    refuse_pointer(file)
    try:
        with file.open("rb") as opened:
            n_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(n_bytes))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = (8 + n_bytes + offset for offset in entry["data_offsets"])  # counted from the header
            found[name] = StoredTensor(file, entry["dtype"], entry["shape"], start, end)
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise SimDiffError(f"{label} is no safetensors file; fetch it again.") from error
    if max((tensor.end for tensor in found.values()), default=0) > file.stat().st_size:
        raise SimDiffError(f"{label} is cut short; fetch it again.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads: the only one, else those of its index.

    Raises:
        SimDiffError: the index is damaged or names a file that is not there, or there is neither.
    """
    single = folder / "model.safetensors"
    if single.is_file():  # which transformers prefers, too, should an index be left from before
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        refuse_pointer(index)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SimDiffError(
                f"{index.name} in {folder.name} is no index of weight files; fetch it again."
            ) from error
        missing = [file.name for file in files if not file.is_file() or file.parent != folder]
        if missing:
            raise SimDiffError(f"{folder.name} lacks {missing[0]}, which its index names; fetch it again.")
        if files:
            return files
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(others) > 1:
        raise SimDiffError(
            f"{folder.name} holds {len(others)} weight files ({others[0]} ...) and no "
            "model.safetensors.index.json that says what is in which: fetch the index as well."
        )
    if others:
        raise SimDiffError(
            f"{folder.name} holds {others[0]}, and transformers looks for model.safetensors: rename it if it "
            "holds the whole model."
        )
    raise SimDiffError(
        f"{folder.name} has no .safetensors weights, and pickled ones are not read; "
        "convert it with `save_pretrained` on a machine that trusts it."
    )


def refuse_pointer(file: Path) -> None:
    """Refuse the small text that a clone without git-lfs holds in the place of a file."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise SimDiffError(
                f"{file.name} in {file.parent.name} is a git-lfs pointer, not the file itself: run `git lfs "
                "pull` in the folder that was cloned."
            )
