"""Stubs where a model's decoder layers are: its own forward runs, and no layer is computed.

So a model tells, whatever its architecture, how each of its layers is called (masks, rotary embeddings, the
kind of attention) and what its head makes of given states (final norm, soft-capping and scaling included).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils.engine.load import decoder_stack, input_device, layers_replaced

Call = tuple[tuple, dict]  # what a layer is given beside the hidden states
Answer = Callable[[int, Tensor, Call], Tensor]  # instead of a layer: its index, the states given, the rest


def states_of(output: Tensor | tuple | list) -> Tensor:
    """The hidden states [batch, seq, d] in what a layer returns: alone, or first among others."""
    return output[0] if isinstance(output, (tuple, list)) else output


class LayerStubs:
    """A model whose layers answer without computing.

    Attributes:
        wrap: what a layer's answer becomes on its way to the model's forward: itself, or a tuple that begins
            with it.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self.wrap: Callable[[Tensor], Tensor | tuple] = lambda hidden: hidden
        self._model, self._n_layers, self._device = model, len(layers), input_device(model)
        self._stubs = nn.ModuleList(_Stub(self, layer, layer_idx) for layer_idx, layer in enumerate(layers))
        self._answer: Answer | None = None

    def record(
        self, input_ids: Tensor, stand_in: Callable[[Tensor], Tensor] = lambda hidden: hidden
    ) -> tuple[Tensor, list[Call]]:
        """The hidden states [batch, seq, d] that enter layer 0, and how each layer is called.

        Args:
            stand_in: what each layer makes of its states.
        """
        calls, given = [], []

        def answer(_layer_idx: int, hidden: Tensor, call: Call) -> Tensor:
            calls.append(call)
            given.append(hidden)
            return stand_in(hidden)

        with self._answering(answer):
            last = decoder_stack(self._model)(input_ids=input_ids.to(self._device), use_cache=False)[0]
        alike = all(hidden.shape == given[0].shape for hidden in given)
        if len(calls) != self._n_layers or not alike or last.dim() != 3:
            raise RuntimeError("a layer is given other states than its neighbour left")
        return given[0], calls

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of states [batch, seq, d] that its last layer leaves: [batch, seq,
        vocabulary]."""
        return self._behind(self._model, hidden).logits

    def normed(self, hidden: Tensor) -> Tensor:
        """The same states as the final norm leaves them."""
        return self._behind(decoder_stack(self._model), hidden)[0]

    def _behind(self, part: nn.Module, hidden: Tensor) -> object:
        """What the model, or its stack of layers, returns where the last layer leaves these states."""
        last_idx = self._n_layers - 1

        def answer(layer_idx: int, given: Tensor, _call: Call) -> Tensor:
            return hidden if layer_idx == last_idx else given

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self._device)  # any, as no layer looks
        mode = torch.inference_mode() if hidden.is_inference() else nullcontext()  # else the caller's
        with mode, self._answering(answer):
            return part(input_ids=ids, use_cache=False)

    @contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        self._answer = answer
        try:
            with layers_replaced(self._model, self._stubs):
                yield
        finally:
            self._answer = None  # it may hold states


class _Stub(nn.Module):
    """Stands in a layer's place. What the model's forward asks of it (its kind of attention, for one), the
    layer tells."""

    def __init__(self, stubs: LayerStubs, layer: nn.Module, layer_idx: int) -> None:
        super().__init__()
        # As plain attributes: registered as submodules, they would be seen below the model.
        vars(self).update(_stubs=stubs, _layer=layer, _stub_idx=layer_idx)

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def forward(self, *args, **kwargs) -> Tensor | tuple:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        return self._stubs.wrap(self._stubs._answer(self._stub_idx, hidden, (args, kwargs)))
