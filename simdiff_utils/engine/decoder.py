"""The one engine: run any subset of a model's decoder layers on any hidden states, whatever the architecture.

No table of model types. The model's own forward, run once with stubs in place of its layers, tells how each
is called; the layers are then run one by one with those arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from simdiff_utils.engine.budget import plan_states_room
from simdiff_utils.engine.entangled import refuse_entangled
from simdiff_utils.engine.load import decoder_layers, input_device, load_model, pick_dtype, text_config
from simdiff_utils.engine.states import HiddenStates, split_prefixes
from simdiff_utils.engine.stubs import Call, LayerStubs, states_of
from simdiff_utils.engine.weights import StreamedWeights

Removed = frozenset[int]
Observer = Callable[[int, Tensor, Tensor], None]
Through = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # a layer on every batch: states before and after
Reviser = Callable[[int, nn.Module, Through], None]


class Decoder:
    """A causal language model as its parts: embeddings, layers that are run one at a time, head.

    Attributes:
        model: the model; where the layers are streamed, their weights are not in it.
        n_layers: how many decoder layers it has.
        device: where it takes its input.
        streamed: the layers are read from disk, each once a pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: StreamedWeights | None = None,
        states_room: float = float("inf"),
    ) -> None:
        """Take a model in eval mode; its layers stay where they are.

        Args:
            weights: where the layers come from; None: they are in the model.
            states_room: bytes of hidden states kept in memory while streaming; what is more goes to disk.

        Raises:
            SimDiffError: the layers cannot be run independently of each other.
        """
        self.model, self.device, self.streamed = model, input_device(model), weights is not None
        self._weights, self._states_room = weights, states_room
        self._layers = decoder_layers(model)
        self.n_layers = len(self._layers)
        self._stubs = LayerStubs(model, self._layers)
        at_hand = range(1 if self.streamed else self.n_layers)
        refuse_entangled(model, self._layers, self._stubs, map(self.layer, at_hand))

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states [batch, seq, d] that enter layer 0, and how each layer is called; no layer is
        computed."""
        return self._stubs.record(input_ids)

    def layer(self, layer_idx: int) -> AbstractContextManager[nn.Module]:
        """The layer, its weights present for as long as a `with` block lasts."""
        return self._weights.layer(layer_idx) if self._weights else nullcontext(self._layers[layer_idx])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary] of states [batch, seq, d] as the last layer leaves them.

        Differentiable, except of the states that `run` yields as they are: parts cut out of them keep a graph
        outside of inference mode.
        """
        return self._stubs.logits(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """The same states after the final norm, [batch, seq, d]."""
        return self._stubs.normed(hidden)

    @torch.inference_mode()
    def run(
        self,
        blocks: Tensor | list[Tensor],
        batch_size: int,
        sets: tuple[Removed, ...] = (frozenset(),),
        observe: Observer | None = None,
        desc: str = "",
        revise: Reviser | None = None,
    ) -> Iterator[tuple[Removed, Tensor, Tensor]]:
        """Run the model without each of several sets of layers; what two sets have in common is computed
        once.

        In memory the batches are run one after another; streamed or revised, all batches go layer by layer.

        Args:
            blocks: token ids [n_blocks, seq_len], no padding; or batches [batch, seq] of different lengths as
                they are.
            batch_size: blocks per forward pass.
            sets: layers to leave out, 0-based.
            observe: called as (layer_idx, states before, states after), [batch, seq, d], for each layer run.
            desc: for the progress bar.
            revise: called as (layer_idx, layer, through) before each layer is run, and may change its
                weights: through() runs it as it then is, batch by batch, as often as asked. For one set.

        Yields:
            (set, the batch's token ids, its states after the last layer), batch by batch and in order for
            each set.
        """
        split = blocks.split(batch_size) if isinstance(blocks, Tensor) else blocks
        batches = [batch.to(self.device) for batch in split]
        waves = [batches] if self.streamed or revise else [[batch] for batch in batches]
        with tqdm(total=len(waves) * self.n_layers, desc=desc, unit="layer", leave=False) as bar:
            for batches in waves:
                with self._room_for(batches, sets) as states:
                    wave = self._enter(batches, states)
                    for layer_idx in range(self.n_layers):
                        self._run_layer(layer_idx, wave, sets, observe, revise)
                        bar.update()
                    for removed in sets:
                        for n, batch in enumerate(batches):
                            yield removed, batch, states.get((removed, n)).to(batch.device)

    def _enter(self, batches: list[Tensor], states: HiddenStates) -> "_Wave":
        calls, by_shape = [], {}
        for n, batch in enumerate(batches):
            hidden, learnt = self.embed(batch)
            states.put((frozenset(), n), hidden)
            calls.append(by_shape.setdefault(batch.shape, learnt))  # the arguments depend on the shape alone
        return _Wave(batches, calls, states)

    def _run_layer(
        self,
        layer_idx: int,
        wave: "_Wave",
        sets: tuple[Removed, ...],
        observe: Observer | None,
        revise: Reviser | None,
    ) -> None:
        """One layer on every batch, once for each prefix: the layers that some set has left out so far."""
        through, around = split_prefixes(sets, layer_idx)
        for prefix in around:
            wave.go_around(layer_idx, prefix)
        with self.layer(layer_idx) if through else nullcontext() as layer:
            for prefix in through:
                run = partial(wave.run, layer, layer_idx, prefix)
                if revise:
                    revise(layer_idx, layer, run)
                for n, (before, after) in enumerate(run()):
                    if observe:
                        observe(layer_idx, before, after)
                    wave.states.put((prefix, n), after)
        for prefix in around - through:
            wave.drop(prefix)

    def _room_for(self, batches: list[Tensor], sets: tuple[Removed, ...]) -> HiddenStates:
        widest = max(sum(map(len, split_prefixes(sets, layer_idx))) for layer_idx in range(self.n_layers))
        n_numbers = widest * sum(batch.numel() for batch in batches) * text_config(self.model).hidden_size
        n_bytes = n_numbers * self.model.dtype.itemsize
        on_disk = self.streamed and n_bytes > self._states_room
        return HiddenStates(on_disk, n_bytes, torch.device("cpu") if self.streamed else None)


@dataclass(frozen=True)
class _Wave:
    """Batches that go through the model side by side.

    Attributes:
        batches: token ids [batch, seq] each.
        calls: of each batch, how every layer is called.
        states: of each prefix and batch, as the last layer that was run left them.
    """

    batches: list[Tensor]
    calls: list[list[Call]]
    states: HiddenStates

    def run(self, layer: nn.Module, layer_idx: int, prefix: Removed) -> Iterator[tuple[Tensor, Tensor]]:
        """The layer on every batch: states [batch, seq, d] before and after it; what is kept stays as it
        is."""
        for n, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
            args, kwargs = calls[layer_idx]
            before = self.states.get((prefix, n)).to(batch.device)
            yield before, states_of(layer(before, *args, **kwargs)).to(before.device)

    def go_around(self, layer_idx: int, prefix: Removed) -> None:
        """The same states also for the sets that leave this layer out."""
        for n in range(len(self.batches)):
            self.states.put((prefix | {layer_idx}, n), self.states.get((prefix, n)))

    def drop(self, prefix: Removed) -> None:
        """Forget the states of a prefix that no set has any more."""
        for n in range(len(self.batches)):
            self.states.drop((prefix, n))


def open_decoder(
    folder: str | Path, dtype: str = "auto", memory_gib: float = 0.0, n_tokens: int = 512
) -> Decoder:
    """A checkpoint as a decoder: in memory where it fits the budget, else streamed from disk layer by layer.

    Args:
        folder: checkpoint in safetensors.
        dtype: as in `pick_dtype`.
        memory_gib: budget for this process (on a GPU: for its memory); 0: what is free now.
        n_tokens: tokens of one forward pass, batch size times length.

    Raises:
        SimDiffError: the budget is too small even for streaming (says what would do), or the layers are
            entangled.
    """
    states_room = plan_states_room(Path(folder), pick_dtype(dtype), memory_gib, n_tokens)
    if states_room is None:
        return Decoder(load_model(folder, dtype))
    return stream_decoder(folder, dtype, states_room)


def stream_decoder(folder: str | Path, dtype: str = "auto", states_room: float = float("inf")) -> Decoder:
    """A checkpoint as a decoder whose layers are read from disk, whatever the memory; see `Decoder` for the
    room."""
    weights = StreamedWeights(Path(folder), pick_dtype(dtype))
    return Decoder(weights.model, weights, states_room)
