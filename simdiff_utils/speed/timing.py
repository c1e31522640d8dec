"""Speed: prefill and decode timed by a named protocol, dense and pruned in turns.

What is timed is checked: the layers of each model are those that its set of removed layers leaves of the
dense one, and the cache holds after each run what the protocol says (`generate`).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.surgery import keep, layers_removed
from simdiff_utils.speed.generate import (
    Protocol,
    Step,
    compile_step,
    decode,
    fill_cache,
    new_cache,
    now,
    prefill,
)

N_LENGTHS = 5  # of the cache, where a decode is integrated
MAX_WARM_UP, STABLE = 4, 0.05  # untimed rounds until two differ by less than this share
_TIMES = ("seconds", "median_step", "p99_step")
KEYS = ["batch_size", "way", "phase", "model", "n_remove"]


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
        same = mine.keys() == theirs.keys()
        if not same or any(not torch.equal(mine[name], theirs[name].to(mine[name])) for name in mine):
            raise SimDiffError(
                f"Layer {new_idx} of the model to be timed is not layer {old_idx} of the dense one: this "
                "is not the model without the layers named; export it again."
            )


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
        median_step and p99_step (seconds: of the run's steps the median and the 99th percentile; NaN where a
        phase is one pass, or not every step was timed), tokens (of the whole batch), tokens_per_s.

    Raises:
        SimDiffError: a model that lacks other layers than said, more tokens than a model's context holds, no
            KV cache, a step that cannot be compiled here.
    """
    for removed, model in pruned.items():
        check_layers(dense, model, removed)
    models = [("dense", 0, dense), *(("pruned", len(removed), model) for removed, model in pruned.items())]
    timed = [(*named, compile_step(named[-1]) if compiled else named[-1]) for named in models]
    prompt = _random_prompt(dense, protocol, seed)
    rows, last, pair = [], float("inf"), -MAX_WARM_UP
    with tqdm(total=n_pairs * len(timed), desc="time prefill and decode") as bar:
        bar.set_postfix_str("warming up")
        while pair < n_pairs:
            total = 0.0
            for name, n_remove, model, step in timed if pair % 2 == 0 else reversed(timed):
                times = _time_run(model, step, compiled, prompt, protocol)
                total += sum(seconds for seconds, *_ in times.values())
                if pair >= 0:
                    rows += [(name, n_remove, phase, pair, *values) for phase, values in times.items()]
                    bar.update()
            stable = abs(total / last - 1) < STABLE
            pair, last = (0 if pair < 0 and stable else pair + 1), total
            if pair == 0:
                bar.set_postfix_str("")
    table = pd.DataFrame(rows, columns=["model", "n_remove", "phase", "pair", *_TIMES])
    table.insert(3, "way", "compiled" if compiled else "eager")
    table.insert(5, "batch_size", protocol.batch_size)
    n_tokens = {"prefill": protocol.prompt_len, protocol.decode_phase: protocol.n_new_tokens}
    table["tokens"] = protocol.batch_size * table["phase"].map(n_tokens)
    table["tokens_per_s"] = table["tokens"] / table["seconds"]
    return table


def _random_prompt(model: PreTrainedModel, protocol: Protocol, seed: int) -> Tensor:
    """Token ids [batch, prompt_len]; refused where the run would outgrow the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and protocol.n_tokens > limit:
        raise SimDiffError(
            f"The speed run reads {protocol.n_tokens} tokens, the model's context holds {limit}: lower "
            "prompt_len or n_new_tokens."
        )
    n_vocab, shape = model.get_input_embeddings().weight.shape[0], (protocol.batch_size, protocol.prompt_len)
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(seed)).to(model.device)


def _time_run(
    model: PreTrainedModel, step: Step, compiled: bool, prompt: Tensor, protocol: Protocol
) -> dict[str, tuple[float, float, float]]:
    """Of each phase of one run: seconds, and those of its steps (see `measure_speed`)."""
    static_len = protocol.n_tokens + 1 if compiled else 0
    cache = new_cache(model, static_len)
    started = now(model.device)
    token, cache = prefill(model, prompt, cache)
    times = {"prefill": (now(model.device) - started, np.nan, np.nan)}

    def time_steps(cache: Cache, n_steps: int) -> np.ndarray:  # a step is compiled when it is first called
        stamps = [now(model.device)]
        try:
            decode(step, token, cache, n_steps, stamps)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise SimDiffError(
                f"The decode step cannot be compiled here ({one_line(error)[:200]}): set compiled = False, "
                "or install a C++ compiler."
            ) from error
        return np.diff(stamps)

    n_timed = protocol.n_timed_steps
    if n_timed:
        del cache
        lengths = np.linspace(protocol.prompt_len, protocol.n_tokens - n_timed, N_LENGTHS).astype(int)
        per_step = []
        for length in lengths:
            cache = fill_cache(model, new_cache(model, static_len), protocol.batch_size, int(length))
            per_step.append(time_steps(cache, n_timed).mean())
        every = protocol.prompt_len + np.arange(protocol.n_new_tokens)  # the length before each step
        between = np.interp(every, lengths + (n_timed - 1) / 2, per_step)
        times[protocol.decode_phase] = (float(between.sum()), np.nan, np.nan)
    elif protocol.n_new_tokens:
        steps = time_steps(cache, protocol.n_new_tokens)
        times[protocol.decode_phase] = (steps.sum(), np.median(steps), np.quantile(steps, 0.99))
    return times


def summarise_speed(samples: pd.DataFrame) -> pd.DataFrame:
    """Medians and quartiles of `measure_speed`'s rows, and the speedup over the dense model, pair by pair.

    Two runs of one round share the machine's mood, so their ratio spreads less than the times do. The speedup
    is the geometric mean of (dense seconds / this one's) over the pairs, its interval the 95 % interval by
    Student's t of the mean of the logarithms; from one pair, the widest there is.

    Returns:
        One row per (batch_size, way, phase, model, n_remove): n_pairs, seconds and tokens_per_s (medians)
        with their quartiles (_q25, _q75), median_step and p99_step (medians over the runs), speedup,
        speedup_low, speedup_high.
    """
    base = samples[samples["model"] == "dense"].set_index(["batch_size", "way", "phase", "pair"])["seconds"]
    rows = []
    for key, group in samples.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, key, strict=True)) | {"n_pairs": len(group)}
        for column in ("seconds", "tokens_per_s"):
            row[column] = group[column].median()
            for share in (0.25, 0.75):
                row[f"{column}_q{share * 100:.0f}"] = group[column].quantile(share)
        row |= group[["median_step", "p99_step"]].median().to_dict()
        logs = np.log([base[(*key[:3], run.pair)] / run.seconds for run in group.itertuples()])
        n, mean, half = len(logs), logs.mean(), np.inf
        if n > 1:
            half = stats.t.ppf(0.975, n - 1) * np.std(logs, ddof=1) / n**0.5
        speedup = {"speedup": mean, "speedup_low": mean - half, "speedup_high": mean + half}
        rows.append(row | {column: np.exp(log) for column, log in speedup.items()})
    return pd.DataFrame(rows)
