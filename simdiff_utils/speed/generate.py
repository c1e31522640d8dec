"""One run of a model on a real KV cache: a protocol, prefill, decode, and the caches they work on.

Prefill reads the whole prompt in one pass and is bound by arithmetic; decode reads all weights once per token
and is bound by memory bandwidth (`bound` says how far either can go). Whatever ran, the cache has to hold
afterwards as many tokens as were read.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from simdiff_utils import SimDiffError


@dataclass(frozen=True)
class Protocol:
    """What one run reads and writes.

    Attributes:
        batch_size: sequences at once.
        prompt_len: tokens of each that one pass reads (prefill; its time is the time to the first token).
        n_new_tokens: tokens then decoded, one pass each, greedily and without an early end; 0: prefill alone.
        n_timed_steps: 0: all steps are timed. Else so many at each of `timing.N_LENGTHS` lengths of the
            cache, which is filled with random states; the decode's time is then the integral over the lengths
            between, and is labelled so.
    """

    batch_size: int
    prompt_len: int
    n_new_tokens: int
    n_timed_steps: int = 0

    @property
    def decode_phase(self) -> str:
        """How the decode's rows are labelled."""
        return "decode (integrated)" if self.n_timed_steps else "decode"

    @property
    def n_tokens(self) -> int:
        """Tokens of a sequence when the run has ended."""
        return self.prompt_len + self.n_new_tokens


PROTOCOLS = {
    "demo": Protocol(1, 256, 16),
    "interactive": Protocol(1, 512, 128),
    "prefill": Protocol(1, 2048, 0),
    "paper": Protocol(16, 4, 2048),  # SimDiff, Table 4
}
Step = Callable[..., object]  # the model's forward, as it is or compiled


def compile_step(model: PreTrainedModel) -> Step:
    """The decode step compiled for a static cache; on a GPU as a CUDA graph, which takes Python's time out of
    it."""
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    return torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """One pass over [batch, length] into an empty KV cache (the model's own kind where none is given).

    Returns:
        (the greedy next token [batch, 1], the cache, which now holds `length` tokens).

    Raises:
        SimDiffError: the model kept no KV cache of that length, or states of another kind.
    """
    # Only the last position's logits are needed; those of all would cost more than the layers do.
    takes = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    output = model(input_ids=input_ids, use_cache=True, past_key_values=cache, **last_only)
    _check_cache(getattr(output, "past_key_values", None), input_ids.shape[1])
    return output.logits[:, -1:].argmax(-1), output.past_key_values


@torch.inference_mode()
def decode(
    step: Step, token: Tensor, cache: Cache, n_new_tokens: int, stamps: list[float] | None = None
) -> Tensor:
    """Greedy generation on the cache, one pass per token, always `n_new_tokens` passes (no early end).

    Args:
        step: the model, or its compiled step where the cache is static.
        token: the first token to read, [batch, 1], as `prefill` returns it.
        stamps: the clock is put here when each token is there, as whoever waits for it sees it.

    Returns:
        The tokens that followed it, [batch, n_new_tokens].
    """
    n_cached = int(cache.get_seq_length())
    generated = []
    for _ in range(n_new_tokens):
        logits = step(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1).clone()  # a CUDA graph writes its next answer over this one
        generated.append(token)
        if stamps is not None:
            stamps.append(now(token.device))
    _check_cache(cache, n_cached + n_new_tokens)
    return torch.cat(generated, dim=1) if generated else token[:, :0]


def new_cache(model: PreTrainedModel, static_len: int = 0) -> Cache:
    """An empty KV cache that grows, or a static one for `static_len` tokens, as a compiled step needs it."""
    if static_len:
        return StaticCache(config=model.config, max_cache_len=static_len)
    return DynamicCache(config=model.config)


@torch.inference_mode()
def fill_cache(model: PreTrainedModel, cache: Cache, batch_size: int, n_tokens: int) -> Cache:
    """An empty cache filled with random keys and values of `n_tokens` tokens: the time of a step depends on
    no value."""
    _, one = prefill(model, torch.zeros(batch_size, 1, dtype=torch.long, device=model.device))
    for layer_idx, layer in enumerate(one.layers):
        wanted = (states.expand(-1, -1, n_tokens, -1) for states in (layer.keys, layer.values))
        cache.update(*map(torch.randn_like, wanted), layer_idx)
    _check_cache(cache, n_tokens)
    return cache


def _check_cache(cache: object, n_tokens: int) -> None:
    layers = cache.layers if isinstance(cache, Cache) else []
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise SimDiffError(
            "Some layers of this model keep other states than keys and values (linear attention, state "
            "space, convolution): this model cannot be timed with a KV cache."
        )
    length = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if length != n_tokens:
        raise SimDiffError(
            f"The KV cache holds {length} tokens where {n_tokens} were read: this model cannot be "
            "timed with a KV cache."
        )


def now(device: torch.device) -> float:
    """The clock in seconds, read when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
