"""A checkpoint's tensors told apart by the decoder layer they belong to."""

import re
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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
        prefix = _decoder_prefix({name: match[1] for name, match in found.items()}, path, model)
        if prefix is None:
            raise SimDiffError(
                f"the weights in {folder.name} do not tell {len(layers)} decoder layers apart by names like "
                f"{path}.0; save them with this transformers."
            )
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


def _decoder_prefix(prefixes: dict[str, str], path: str, model: PreTrainedModel) -> str | None:
    """What stands before a decoder layer's index in a file; None: nothing.

    Of all prefixes (a vision tower's layers have one, too) the first with a tensor that transformers loads
    into the model's own list of layers.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = (model.base_model_prefix, model.state_dict())
    for name, prefix in prefixes.items():
        loaded_as = {
            rename_source_key(name, *given, *own)[0] for given in ((renamings, converters), ([], []))
        }
        if any(new in own[1] and new.startswith(f"{path}.") for new in loaded_as):
            return prefix
    return None
