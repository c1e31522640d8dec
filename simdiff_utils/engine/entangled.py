"""Models that cannot be pruned by layers, because these share more than the hidden states they hand on.

Found by structure and by trial, not by a table of model types.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.load import text_config
from simdiff_utils.engine.stubs import LayerStubs


def refuse_entangled(model: PreTrainedModel, layers: nn.ModuleList, stubs: LayerStubs) -> None:
    """Refuse a model whose layers are entangled; on the way the stubs learn whether they return tuples.

    Raises:
        SimDiffError: naming family and cause.
    """
    cause = _shared_parts(model, layers) or _other_channels(stubs)
    if cause:
        raise SimDiffError(f"{type(model).__name__} cannot be pruned by layers: {cause}.")


def _shared_parts(model: PreTrainedModel, layers: nn.ModuleList) -> str:
    """What the layers share by construction: weights, or keys and values; "" for nothing."""
    owners = {}
    for layer_idx, layer in enumerate(layers):
        if any(owners.setdefault(id(p), layer_idx) != layer_idx for p in layer.parameters()):
            return "its layers share weights"
    for name, value in vars(text_config(model)).items():
        if "kv_shared" in name and value:
            return f"later layers reuse the keys and values of earlier ones ({name} = {value})"
    return ""


def _other_channels(stubs: LayerStubs) -> str:
    """What the layers learn beside their hidden states, tried on two texts with noise for states; "" for
    nothing."""
    texts = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 3, 2, 1]])]  # any text that has no padding
    generator = torch.Generator().manual_seed(0)

    def noise(hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape, generator=generator).to(hidden)

    with torch.inference_mode():
        try:
            stubs.record(texts[0], noise)
        except Exception:  # whatever a model makes of a tensor where it takes a tuple apart
            stubs.return_tuples = True
        try:
            one, other = (stubs.record(text, noise)[1] for text in texts)
        except Exception as error:  # it takes apart more than a tuple of one
            return f"its layers hand on more than hidden states ({one_line(error)})"
    for layer_idx, calls in enumerate(zip(one, other, strict=True)):
        for (path, mine), (_, theirs) in zip(*map(_leaves, calls), strict=True):
            if isinstance(mine, Tensor) and not torch.equal(mine, theirs):
                return f"layer {layer_idx} reads more of the text than its hidden states ({path})"
    return ""


def _leaves(value: object, path: str = "arguments") -> Iterator[tuple[str, object]]:
    """Everything inside nested dicts, lists and tuples, with the way to it."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, str(key) if isinstance(key, str) else path)
    else:
        yield path, value
