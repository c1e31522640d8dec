"""Models that cannot be pruned by layers, because these share more than the hidden states they hand on.

Found by structure and by trial, not by a table of model types.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.load import text_config
from simdiff_utils.engine.stubs import LayerStubs, states_of


class _Beside:
    """What a layer returns beside its hidden states, as the stubs do: a thing that nobody can use."""


# What layers return, as far as it can be told from outside: states; a tuple of them; a pair, its second part
# attention weights that nobody asked for.
_WRAPS = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, _Beside()))


def refuse_entangled(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    stubs: LayerStubs,
    at_hand: Iterable[AbstractContextManager[nn.Module]],
) -> None:
    """Refuse a model whose layers are entangled; on the way the stubs learn what its layers return.

    Args:
        at_hand: the first layers, as many as are in memory, each with its weights in a `with` block.

    Raises:
        SimDiffError: naming family and cause.
    """
    cause = _shared_parts(model, layers) or _other_channels(stubs) or _later_tokens(stubs, at_hand)
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
    failed = None

    def noise(hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape, generator=generator).to(hidden)

    with torch.inference_mode():
        for stubs.wrap in _WRAPS:
            try:
                one, other = (stubs.record(text, noise)[1] for text in texts)
                break
            except Exception as error:  # whatever a model makes of a tensor where it takes a tuple apart
                failed = error
        else:
            return f"its layers hand on more than hidden states ({one_line(failed)})"
    for layer_idx, calls in enumerate(zip(one, other, strict=True)):
        for (path, mine), (_, theirs) in zip(*map(_leaves, calls), strict=True):
            if isinstance(mine, _Beside):
                return f"layer {layer_idx} is given more of the one before than its hidden states ({path})"
            if isinstance(mine, Tensor) and not torch.equal(mine, theirs):
                return f"layer {layer_idx} reads more of the text than its hidden states ({path})"
    return ""


def _later_tokens(stubs: LayerStubs, at_hand: Iterable[AbstractContextManager[nn.Module]]) -> str:
    """Whether a token's states depend on tokens behind it, as in an encoder, whose perplexity is none; or a
    layer does not run at all; "" for neither."""
    with torch.inference_mode():
        states, calls = stubs.record(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]))  # another last token
        for layer_idx, present in enumerate(at_hand):
            args, kwargs = calls[layer_idx]
            try:
                with present as layer:
                    states = states_of(layer(states, *args, **kwargs))
            except Exception as error:  # code of its own, or a config that its family cannot run
                return f"its layer {layer_idx} does not run ({one_line(error)})"
            one, other = states[:, :-1].float()
            if (one - other).abs().max() > 1e-2 * one.abs().max():  # more than rounding
                return f"in its layer {layer_idx} tokens depend on later ones, as in an encoder"
    return ""


def _leaves(value: object, path: str = "arguments") -> Iterator[tuple[str, object]]:
    """Everything inside nested dicts, lists and tuples, with the way to it."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, str(key) if isinstance(key, str) else path)
    else:
        yield path, value
