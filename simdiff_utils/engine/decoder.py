"""The one engine: run any subset of a model's decoder layers on any hidden states, whatever the architecture.

No table of model types. The model's own forward runs once with stubs in place of its layers and so tells,
without computing a layer, how each is called: masks, rotary embeddings, the kind of attention. The layers are
then run one by one with those arguments. The same forward with a stub that answers with given hidden states
gives their logits: final norm, head, soft-capping and scaling are the model's own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.budget import plan_memory
from simdiff_utils.engine.load import (
    decoder_layers,
    decoder_stack,
    input_device,
    layers_replaced,
    load_model,
    pick_dtype,
    text_config,
)
from simdiff_utils.engine.states import HiddenStates, split_prefixes
from simdiff_utils.engine.weights import StreamedWeights

Call = tuple[tuple, dict]  # what a layer is given beside the hidden states
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
        self.model, self.streamed, self._weights, self._states_room = (
            model,
            weights is not None,
            weights,
            states_room,
        )
        self.device = input_device(model)
        self._layers = decoder_layers(model)
        self.n_layers = len(self._layers)
        self._answer: Callable[[Tensor], Tensor] = lambda hidden: hidden
        self._calls: list[Call] = []
        self._returns_tuple = False
        self._stubs = nn.ModuleList([_Stub(self, layer) for layer in self._layers])
        self._refuse_entangled_layers()

    # ---- parts -----------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states [batch, seq, d] that enter layer 0, and how each layer is called; no layer is
        computed."""
        return self._record(input_ids, lambda hidden: hidden), self._calls

    def layer(self, layer_idx: int) -> AbstractContextManager[nn.Module]:
        """The layer, its weights present for as long as a `with` block lasts."""
        return self._weights.layer(layer_idx) if self._weights else nullcontext(self._layers[layer_idx])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary] of states [batch, seq, d] as the last layer leaves them.

        Differentiable, except of the states that `run` yields as they are: parts cut out of them keep a graph
        outside of inference mode.
        """
        last = iter([False] * (self.n_layers - 1) + [True])
        self._answer = lambda given: hidden if next(last) else given
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        mode = torch.inference_mode() if hidden.is_inference() else nullcontext()  # else the caller's
        with mode, layers_replaced(self.model, self._stubs):
            return self.model(input_ids=ids, use_cache=False).logits

    def _record(self, input_ids: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        self._calls, first, self._answer = [], [], lambda hidden: first.append(hidden) or answer(hidden)
        with layers_replaced(self.model, self._stubs):
            last = decoder_stack(self.model)(input_ids=input_ids.to(self.device), use_cache=False)[0]
        if (
            len(self._calls) != self.n_layers
            or any(h.shape != first[0].shape for h in first)
            or last.dim() != 3
        ):
            raise RuntimeError("a layer is given other states than its neighbour left")
        return first[0]

    def _refuse_entangled_layers(self) -> None:
        """Learn whether layers return a tuple, and refuse a model whose layers share more than hidden
        states."""
        family, config = type(self.model).__name__, text_config(self.model)
        owners = {}
        for layer_idx, layer in enumerate(self._layers):
            if any(owners.setdefault(id(p), layer_idx) != layer_idx for p in layer.parameters()):
                raise SimDiffError(f"{family} cannot be pruned by layers: its layers share weights.")
        shared = next((name for name in vars(config) if "kv_shared" in name and getattr(config, name)), None)
        if shared:
            raise SimDiffError(
                f"{family} cannot be pruned by layers: later layers reuse the keys and values of "
                f"earlier ones ({shared} = {getattr(config, shared)})."
            )
        generator = torch.Generator().manual_seed(0)
        texts = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 3, 2, 1]])]  # any text that has no padding

        def noise(hidden: Tensor) -> Tensor:
            return torch.randn(hidden.shape, generator=generator).to(hidden)

        with torch.inference_mode():
            try:
                self._record(texts[0], noise)
            except Exception:  # whatever a model makes of a tensor where it takes a tuple apart
                self._returns_tuple = True
            calls = []
            try:
                for text in texts:
                    self._record(text, noise)
                    calls.append(self._calls)
            except Exception as error:  # it takes apart more than a tuple of one
                raise SimDiffError(
                    f"{family} cannot be pruned by layers: its layers hand on more than hidden states "
                    f"({one_line(error)})."
                ) from error
        for layer_idx, (one, other) in enumerate(zip(*calls, strict=True)):
            differing = [
                path
                for (path, a), (_, b) in zip(_leaves(one), _leaves(other), strict=True)
                if isinstance(a, Tensor) and not torch.equal(a, b)
            ]
            if differing:
                raise SimDiffError(
                    f"{family} cannot be pruned by layers: layer {layer_idx} reads more of the text "
                    f"than its hidden states ({differing[0]})."
                )

    # ---- passes ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self,
        blocks: Tensor | list[Tensor],
        batch_size: int,
        sets: tuple[frozenset[int], ...] = (frozenset(),),
        observe: Observer | None = None,
        desc: str = "",
        revise: Reviser | None = None,
    ) -> Iterator[tuple[frozenset[int], Tensor, Tensor]]:
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
            for wave in waves:
                with self._states(wave, sets) as states:
                    calls = self._enter(wave, states)
                    self._run_layers(wave, states, calls, sets, observe, revise, bar)
                    for removed in sets:
                        for n, batch in enumerate(wave):
                            yield removed, batch, states.get((removed, n)).to(batch.device)

    def _enter(self, wave: list[Tensor], states: "HiddenStates") -> list[list[Call]]:
        calls, by_shape = [], {}
        for n, batch in enumerate(wave):
            hidden, learnt = self.embed(batch)
            states.put((frozenset(), n), hidden)
            calls.append(by_shape.setdefault(batch.shape, learnt))  # the arguments depend on the shape alone
        return calls

    def _run_layers(
        self,
        wave: list[Tensor],
        states: "HiddenStates",
        calls: list[list[Call]],
        sets: tuple[frozenset[int], ...],
        observe: Observer | None,
        revise: Reviser | None,
        bar: tqdm,
    ) -> None:
        """Every layer on every batch: one state per batch and prefix, the layers left out so far by some
        set."""
        for layer_idx in range(self.n_layers):
            through, around = split_prefixes(sets, layer_idx)
            for prefix in around:
                for n in range(len(wave)):
                    states.put((prefix | {layer_idx}, n), states.get((prefix, n)))
            with self.layer(layer_idx) if through else nullcontext() as layer:
                for prefix in through:
                    run = partial(
                        _run_layer, layer, wave, states, prefix, [call[layer_idx] for call in calls]
                    )
                    if revise:
                        revise(layer_idx, layer, run)
                    for n, (before, after) in enumerate(run()):
                        if observe:
                            observe(layer_idx, before, after)
                        states.put((prefix, n), after)
            for prefix in around - through:
                for n in range(len(wave)):
                    states.drop((prefix, n))
            bar.update()

    def _states(self, wave: list[Tensor], sets: tuple[frozenset[int], ...]) -> "HiddenStates":
        config = text_config(self.model)
        widest = max(sum(map(len, split_prefixes(sets, layer_idx))) for layer_idx in range(self.n_layers))
        n_bytes = (
            widest * sum(batch.numel() for batch in wave) * config.hidden_size * self.model.dtype.itemsize
        )
        return HiddenStates(
            on_disk=self.streamed and n_bytes > self._states_room,
            n_bytes=n_bytes,
            device=torch.device("cpu") if self.streamed else None,
        )


class _Stub(nn.Module):
    """Stands in a layer's place: notes how it is called, and answers as the decoder says. Whatever else the
    model's forward asks of it (its kind of attention, for one), the layer tells."""

    def __init__(self, decoder: Decoder, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_decoder", decoder)  # no submodules: neither is to be seen below the model
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def forward(self, *args, **kwargs) -> Tensor | tuple[Tensor]:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        self._decoder._calls.append((args, kwargs))
        answer = self._decoder._answer(hidden)
        return (answer,) if self._decoder._returns_tuple else answer


def _run_layer(
    layer: nn.Module, wave: list[Tensor], states: HiddenStates, prefix: frozenset[int], calls: list[Call]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The layer on every batch: states [batch, seq, d] before and after it; what is kept stays as it is."""
    for n, (batch, (args, kwargs)) in enumerate(zip(wave, calls, strict=True)):
        before = states.get((prefix, n)).to(batch.device)
        after = layer(before, *args, **kwargs)
        yield before, (after[0] if isinstance(after, (tuple, list)) else after).to(before.device)


def _leaves(value: object, path: str = "arguments") -> Iterator[tuple[str, object]]:
    """Everything inside nested dicts, lists and tuples, with the way to it."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, str(key) if isinstance(key, str) else path)
    else:
        yield path, value


def open_decoder(folder: Path, dtype: str = "auto", memory_gib: float = 0.0, n_tokens: int = 512) -> Decoder:
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
    plan = plan_memory(folder, pick_dtype(dtype), memory_gib, n_tokens)
    if not plan.streamed:
        return Decoder(load_model(folder, dtype))
    return stream_decoder(folder, dtype, plan.states_room)


def stream_decoder(folder: Path, dtype: str = "auto", states_room: float = float("inf")) -> Decoder:
    """A checkpoint as a decoder whose layers are read from disk, whatever the memory; see `Decoder` for the
    room."""
    weights = StreamedWeights(folder, pick_dtype(dtype))
    return Decoder(weights.model, weights, states_room)
