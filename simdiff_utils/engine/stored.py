"""A checkpoint's tensors told apart by the decoder layer they belong to."""

import re
from pathlib import Path

from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.headers import StoredTensor, read_header, weight_files
from simdiff_utils.engine.load import decoder_layers


class StoredWeights:
    """The tensors of a checkpoint folder, told apart by the decoder layer they belong to.

    Attributes:
        tensors: name -> where it lies, all files together.
        layers: for each layer, the names of its tensors.
        rest: the names of all others: embeddings, final norm, head.
        behind: the names of layers that the model does not have, such as one of multi-token prediction.
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
        self.behind: list[str] = []
        for name, match in self._found.items():
            layer_idx = int(match[2])
            (self.layers[layer_idx] if layer_idx < len(layers) else self.behind).append(name)

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
