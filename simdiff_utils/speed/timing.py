"""Speed: prefill and decode timed on a real KV cache by a named protocol, dense and pruned in turns.

Prefill reads the whole prompt in one pass and is bound by arithmetic; decode reads all weights once per token
and is bound by memory bandwidth (`bound` says how far either can go). What is timed is checked: the layers of
each model are those that its set of removed layers leaves of the dense one, and the cache holds after each
run what the protocol says.
"""

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.surgery import keep, layers_removed


@dataclass(frozen=True)
class Protocol:
    """What one run reads and writes.

    Attributes:
        batch_size: sequences at once.
        prompt_len: tokens of each that one pass reads (prefill; its time is the time to the first token).
        n_new_tokens: tokens then decoded, one pass each, greedily and without an early end; 0: prefill alone.
        n_timed_steps: 0: all steps are timed. Else so many at each of `N_LENGTHS` lengths of the cache, which
            is filled with random states; the decode's time is then the integral over the lengths between, and
            is labelled so.
    """

    batch_size: int
    prompt_len: int
    n_new_tokens: int
    n_timed_steps: int = 0

    @property
    def decode_phase(self) -> str:
        """How the decode's rows are labelled."""
        return "decode (integrated)" if self.n_timed_steps else "decode"


PROTOCOLS = {
    "demo": Protocol(1, 256, 16),
    "interactive": Protocol(1, 512, 128),
    "prefill": Protocol(1, 2048, 0),
    "paper": Protocol(16, 4, 2048),
}  # paper: SimDiff, Table 4
N_LENGTHS = 5
MAX_WARM_UP, STABLE = 4, 0.05  # untimed rounds until two differ by less than this share
Step = Callable[..., object]  # the model's forward, as it is or compiled


# ---- what is timed -------------------------------------------------------------------------------
@contextmanager
def without_layers(model: PreTrainedModel, removed: frozenset[int]) -> Iterator[PreTrainedModel]:
    """A second model without some layers, on the very weights of the first: both can be timed, neither is
    copied.

    Raises:
        SimDiffError: as `surgery.plan_cut`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with layers_removed(copy.deepcopy(model, shared), removed) as shallow:
        yield shallow


def check_layers(dense: PreTrainedModel, timed: PreTrainedModel, removed: frozenset[int]) -> None:
    """Refuse to time a model whose layers are not those that `removed` (0-based) leaves of the dense one, bit
    for bit."""
    layers, timed_layers = decoder_layers(dense), decoder_layers(timed)
    kept = keep(removed, len(layers))
    if len(timed_layers) != len(kept):
        raise SimDiffError(
            f"The model to be timed has {len(timed_layers)} layers where {len(kept)} should be left; "
            "export it again."
        )
    for new_idx, old_idx in enumerate(kept):
        mine, theirs = (dict(layer.named_parameters()) for layer in (layers[old_idx], timed_layers[new_idx]))
        if mine.keys() != theirs.keys() or any(
            not torch.equal(mine[name], theirs[name].to(mine[name])) for name in mine
        ):
            raise SimDiffError(
                f"Layer {new_idx} of the model to be timed is not layer {old_idx} of the dense one: this "
                "is not the model without the layers named; export it again."
            )


def compile_step(model: PreTrainedModel) -> Step:
    """The decode step compiled for a static cache; on a GPU as a CUDA graph, which takes Python's time out of
    it."""
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    return torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)


# ---- one run -------------------------------------------------------------------------------------
@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """One pass over [batch, length] into an empty KV cache (the model's own kind where none is given).

    Returns:
        (the greedy next token [batch, 1], the cache, which now holds `length` tokens).

    Raises:
        SimDiffError: the model kept no KV cache of that length.
    """
    # Only the last position's logits are needed; those of all would cost more than the layers do.
    last_only = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    output = model(input_ids=input_ids, use_cache=True, past_key_values=cache, **last_only)
    _check_cache(output.past_key_values, input_ids.shape[1])
    return output.logits[:, -1:].argmax(-1), output.past_key_values


@torch.inference_mode()
def decode(step: Step, token: Tensor, cache: Cache, n_new_tokens: int) -> Tensor:
    """Greedy generation on the cache, one pass per token, always `n_new_tokens` passes (no early end).

    Args:
        step: the model, or its compiled step where the cache is static.
        token: the first token to read, [batch, 1], as `prefill` returns it.

    Returns:
        The tokens that followed it, [batch, n_new_tokens].
    """
    n_cached = int(cache.get_seq_length())
    generated = []
    for _ in range(n_new_tokens):
        logits = step(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1).clone()  # a CUDA graph writes its next answer over this one
        generated.append(token)
    _check_cache(cache, n_cached + n_new_tokens)
    return torch.cat(generated, dim=1) if generated else token[:, :0]


def _check_cache(cache: object, n_tokens: int) -> None:
    length = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if length != n_tokens:
        raise SimDiffError(
            f"The KV cache holds {length} tokens where {n_tokens} were read: this model cannot be "
            "timed with a KV cache."
        )


@torch.inference_mode()
def fill_cache(model: PreTrainedModel, cache: Cache, batch_size: int, n_tokens: int) -> Cache:
    """An empty cache filled with random keys and values of `n_tokens` tokens: the time of a step depends on
    no value."""
    _, one = prefill(model, torch.zeros(batch_size, 1, dtype=torch.long, device=model.device))
    for layer_idx, layer in enumerate(one.layers):
        keys, values = (
            torch.randn_like(states.expand(-1, -1, n_tokens, -1)) for states in (layer.keys, layer.values)
        )
        cache.update(keys, values, layer_idx)
    _check_cache(cache, n_tokens)
    return cache


def _new_cache(model: PreTrainedModel, compiled: bool, max_len: int) -> Cache:
    return (
        StaticCache(config=model.config, max_cache_len=max_len)
        if compiled
        else DynamicCache(config=model.config)
    )


def _time_run(
    model: PreTrainedModel, step: Step, compiled: bool, prompt: Tensor, protocol: Protocol
) -> dict[str, float]:
    """Seconds of each phase of one run."""
    longest = protocol.prompt_len + protocol.n_new_tokens + 1
    cache = _new_cache(model, compiled, longest)
    started = _now(model)
    token, cache = prefill(model, prompt, cache)
    seconds = {"prefill": _now(model) - started}
    if protocol.n_timed_steps:
        del cache
        lengths = np.linspace(protocol.prompt_len, longest - 1 - protocol.n_timed_steps, N_LENGTHS).astype(
            int
        )
        per_step = []
        for length in lengths:
            cache = fill_cache(model, _new_cache(model, compiled, longest), protocol.batch_size, int(length))
            started = _now(model)
            decode(step, token, cache, protocol.n_timed_steps)
            per_step.append((_now(model) - started) / protocol.n_timed_steps)
        middle = lengths + (protocol.n_timed_steps - 1) / 2
        every = np.interp(protocol.prompt_len + np.arange(protocol.n_new_tokens), middle, per_step)
        seconds[protocol.decode_phase] = float(every.sum())
    elif protocol.n_new_tokens:
        started = _now(model)
        decode(step, token, cache, protocol.n_new_tokens)
        seconds[protocol.decode_phase] = _now(model) - started
    return seconds


def _now(model: PreTrainedModel) -> float:
    """The clock in seconds, read when the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


# ---- measuring -----------------------------------------------------------------------------------
def measure_speed(
    dense: PreTrainedModel,
    pruned: dict[frozenset[int], PreTrainedModel],
    protocol: Protocol,
    n_pairs: int,
    compiled: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Time all models in turns on the same random tokens, so that a drift of the machine meets each alike.

    Each round times every model once, in an order that reverses from round to round; untimed rounds come
    first, until two of them take the same time.

    Args:
        pruned: the set of layers that each lacks -> the model; checked against the dense one.
        n_pairs: rounds that are timed.
        compiled: the decode step compiled on a static cache.

    Returns:
        One row per (model, phase, pair) in the order measured: model ("dense", "pruned"), n_remove, phase
        ("prefill", "decode" or "decode (integrated)"), way ("eager", "compiled"), pair, batch_size, seconds,
        tokens (of the whole batch), tokens_per_s.

    Raises:
        SimDiffError: a model that lacks other layers than said, more tokens than a model's context holds, no
            KV cache, a step that cannot be compiled here.
    """
    for removed, model in pruned.items():
        check_layers(dense, model, removed)
    timed = [("dense", 0, dense), *(("pruned", len(removed), model) for removed, model in pruned.items())]
    longest = protocol.prompt_len + protocol.n_new_tokens
    limit = getattr(dense.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit:
        raise SimDiffError(
            f"The speed run reads {longest} tokens, the model's context holds {limit}: lower prompt_len "
            "or n_new_tokens."
        )
    n_vocab = dense.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(
        n_vocab, (protocol.batch_size, protocol.prompt_len), generator=torch.Generator().manual_seed(seed)
    ).to(dense.device)
    steps = [compile_step(model) if compiled else model for *_, model in timed]
    counts = {
        "prefill": protocol.batch_size * protocol.prompt_len,
        protocol.decode_phase: protocol.batch_size * protocol.n_new_tokens,
    }
    rows, last = [], float("inf")
    with tqdm(total=n_pairs * len(timed), desc="time prefill and decode") as bar:
        bar.set_postfix_str("warming up")
        pair = -MAX_WARM_UP
        while pair < n_pairs:
            order = list(range(len(timed)))
            total = 0.0
            for which in order if pair % 2 == 0 else reversed(order):
                name, n_remove, model = timed[which]
                try:
                    seconds = _time_run(model, steps[which], compiled, prompt, protocol)
                except torch._dynamo.exc.TorchDynamoException as error:
                    raise SimDiffError(
                        f"The decode step cannot be compiled here ({one_line(error)[:200]}): set compiled "
                        "= False, or install a C++ compiler."
                    ) from error
                total += sum(seconds.values())
                rows += [
                    dict(
                        model=name,
                        n_remove=n_remove,
                        phase=phase,
                        way="compiled" if compiled else "eager",
                        pair=pair,
                        batch_size=protocol.batch_size,
                        seconds=value,
                        tokens=counts[phase],
                        tokens_per_s=counts[phase] / value,
                    )
                    for phase, value in seconds.items()
                    if pair >= 0
                ]
                if pair >= 0:
                    bar.update()
            stable = abs(total / last - 1) < STABLE
            pair, last = (0 if pair < 0 and stable else pair + 1), total
            if pair == 0:
                bar.set_postfix_str("")
    return pd.DataFrame(rows)


KEYS = ["batch_size", "way", "phase", "model", "n_remove"]


def summarise_speed(samples: pd.DataFrame) -> pd.DataFrame:
    """Medians and quartiles of `measure_speed`'s rows, and the speedup over the dense model, pair by pair.

    Two runs of one round share the machine's mood, so their ratio spreads less than the times do. The speedup
    is the geometric mean of (dense seconds / this one's) over the pairs, its interval the 95 % interval by
    Student's t of the mean of the logarithms; from one pair, the widest there is.

    Returns:
        One row per (batch_size, way, phase, model, n_remove): n_pairs, seconds and tokens_per_s (medians)
        with their quartiles (_q25, _q75), speedup, speedup_low, speedup_high.
    """
    base = samples[samples["model"] == "dense"].set_index(["batch_size", "way", "phase", "pair"])["seconds"]
    rows = []
    for key, group in samples.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, key, strict=True)) | {"n_pairs": len(group)}
        for column in ("seconds", "tokens_per_s"):
            row |= {
                column: group[column].median(),
                f"{column}_q25": group[column].quantile(0.25),
                f"{column}_q75": group[column].quantile(0.75),
            }
        logs = np.log([base[(*key[:3], run.pair)] / run.seconds for run in group.itertuples()])
        half = (
            stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / len(logs) ** 0.5
            if len(logs) > 1
            else np.inf
        )
        rows.append(
            row
            | {
                "speedup": np.exp(logs.mean()),
                "speedup_low": np.exp(logs.mean() - half),
                "speedup_high": np.exp(logs.mean() + half),
            }
        )
    return pd.DataFrame(rows)
