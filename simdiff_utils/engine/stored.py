"""A checkpoint's tensors as its files' headers state them: where each lies, and which layer it belongs to."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers


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


class StoredWeights:
    """The tensors of a checkpoint folder, told apart by the decoder layer they belong to.

    Attributes:
        tensors: name -> where it lies, all files together.
        layers: for each layer, the names of its tensors.
        rest: the names of all others: embeddings, final norm, head.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Read the headers.

        Args:
            model: of this checkpoint; its weights may be on the meta device.

        Raises:
            SimDiffError: a file is damaged, or the tensors' names do not tell the layers apart.
        """
        layers = decoder_layers(model)
        path = next(name for name, module in model.named_modules() if module is layers)
        self.tensors: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            self.tensors |= read_header(file)
        # what stands before a layer's index, the index, what follows it
        pattern = re.compile(rf"((?:.*?\.)?{re.escape(path.rpartition('.')[2])}\.)(\d+)(\..+)")
        found = {name: match for name in self.tensors if (match := pattern.fullmatch(name))}
        prefix = _decoder_prefix([match.groups() for match in found.values()], path, len(layers), folder)
        self._found = {name: match for name, match in found.items() if match[1] == prefix}
        self.rest = [name for name in self.tensors if name not in self._found]
        self.layers: list[list[str]] = [[] for _ in layers]
        for name, match in self._found.items():
            if int(match[2]) < len(layers):  # files may hold more, such as a multi-token prediction layer
                self.layers[int(match[2])].append(name)

    def rename(self, name: str, new_idx: dict[int, int]) -> str:
        """The tensor's name once its layer has a new index; names outside the layers stay."""
        match = self._found.get(name)
        return f"{match[1]}{new_idx[int(match[2])]}{match[3]}" if match else name


def _decoder_prefix(found: list[tuple[str, str, str]], path: str, n_layers: int, folder: Path) -> str:
    """What stands before a decoder layer's index. A vision tower has layers too; and a file may leave out or
    add the first parts of the model's own path to its list of layers."""
    indices: dict[str, set[int]] = {}
    for prefix, layer_idx, _ in found:
        indices.setdefault(prefix, set()).add(int(layer_idx))
    complete = [prefix for prefix, seen in indices.items() if seen >= set(range(n_layers))]
    # The ends of the model's own path, and paths that end in it.
    own = [p for p in complete if f".{path}.".endswith(f".{p}") or f".{p}".endswith(f".{path}.")]
    if len(own or complete) != 1:
        raise SimDiffError(
            f"the weights in {folder.name} do not tell {n_layers} decoder layers apart by names like "
            f"{path}.0; save them with this transformers."
        )
    return (own or complete)[0]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: the only one, else those of its index, else all."""
    single = folder / "model.safetensors"
    if single.is_file():  # which transformers prefers, too, should an index be left from before
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / name for name in weight_map.values()})
        missing = [file.name for file in files if not file.is_file() or file.parent != folder]
        if missing:
            raise SimDiffError(f"{folder.name} lacks {missing[0]}, which its index names; fetch it again.")
        return files
    return sorted(folder.glob("*.safetensors"))
