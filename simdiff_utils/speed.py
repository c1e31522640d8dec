"""Speed: prefill and decode timed on a real KV cache, peak memory of a fresh process, and the ideal beside them.

Prefill reads many tokens in one pass and is bound by arithmetic; decode reads all weights once per token and is
bound by memory bandwidth, so leaving layers out helps it by the share of weights they held, and by no more.
"""

import argparse
import inspect
import json
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from simdiff_utils.results import peak_memory_gib, run_fresh
from simdiff_utils.settings import SimDiffError


def parameters_read_per_token(model: PreTrainedModel) -> int:
    """Weights one decode step has to read, for a dense (not mixture-of-experts) decoder.

    All parameters, each once: a matrix tied to the head counts as the head. Embeddings that are not the head
    (untied input, learned positions) count nothing: a step reads one row of them.
    """
    head = model.get_output_embeddings()
    lookups = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        lookups.pop(id(head.weight), None)
    return sum(p.numel() for p in model.parameters()) - sum(lookups.values())


def ideal_speedup(dense: PreTrainedModel, pruned: PreTrainedModel) -> float:
    """How many times faster decode could at best become: the ratio of the weights read per token."""
    return parameters_read_per_token(dense) / parameters_read_per_token(pruned)


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Cache]:
    """One pass over [batch, length] into a fresh KV cache.

    Returns:
        (the greedy next token [batch, 1], the cache, which now holds `length` tokens).

    Raises:
        SimDiffError: the model kept no KV cache of that length.
    """
    # Only the last position's logits are needed; those of all would cost more than the layers do.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=input_ids, use_cache=True, **last_only)
    _check_cache(output.past_key_values, input_ids.shape[1])
    return output.logits[:, -1:].argmax(-1), output.past_key_values


@torch.inference_mode()
def decode(model: PreTrainedModel, token: Tensor, cache: Cache, n_new_tokens: int) -> Tensor:
    """Greedy generation on the cache, one pass per token, always `n_new_tokens` passes (no early end).

    Args:
        token: the first token to read, [batch, 1], as `prefill` returns it.

    Returns:
        The tokens that followed it, [batch, n_new_tokens].
    """
    n_cached = cache.get_seq_length()
    generated = []
    for _ in range(n_new_tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        generated.append(token)
    _check_cache(cache, n_cached + n_new_tokens)
    return torch.cat(generated, dim=1)


def _check_cache(cache: object, n_tokens: int) -> None:
    length = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if length != n_tokens:
        raise SimDiffError(f"The KV cache holds {length} tokens where {n_tokens} were read: this model cannot be "
                           "timed with a KV cache.")


def measure_speed(models: dict[str, PreTrainedModel], *, batch_size: int, prefill_len: int, prompt_len: int,
                  n_new_tokens: int, n_repeats: int, seed: int = 0) -> pd.DataFrame:
    """Time all models in turns on the same random tokens, so that a drift of the machine meets each alike.

    Each repeat times every model once, in an order that reverses from repeat to repeat; a whole untimed round
    comes first. Lengths are in tokens, per sequence.

    Returns:
        One row per (model, phase, repeat) in the order measured: model, phase ("prefill" or "decode"), repeat,
        seconds, tokens (of the whole batch), tokens_per_s. The pass over decode's prompt is not timed.

    Raises:
        SimDiffError: more tokens than a model's context holds, or a model that keeps no KV cache.
    """
    longest = max(prefill_len, prompt_len + n_new_tokens)
    for name, model in models.items():
        limit = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > limit:
            raise SimDiffError(f"The speed run reads {longest} tokens, {name}'s context holds {limit}: lower "
                               "prefill_len, or prompt_len and n_new_tokens.")
    n_vocab = min(model.get_input_embeddings().weight.shape[0] for model in models.values())
    tokens = torch.randint(n_vocab, (batch_size, max(prefill_len, prompt_len)),
                           generator=torch.Generator().manual_seed(seed))
    rows = []
    with tqdm(total=(n_repeats + 1) * len(models), desc="time prefill and decode") as bar:
        for repeat in range(-1, n_repeats):  # -1 warms up
            for name in list(models) if repeat % 2 == 0 else reversed(models):
                seconds = _time_once(models[name], tokens[:, :prefill_len], tokens[:, :prompt_len], n_new_tokens)
                counts = {"prefill": batch_size * prefill_len, "decode": batch_size * n_new_tokens}
                rows += [{"model": name, "phase": phase, "repeat": repeat, "seconds": seconds[phase],
                          "tokens": n, "tokens_per_s": n / seconds[phase]}
                         for phase, n in counts.items() if repeat >= 0]
                bar.update()
    return pd.DataFrame(rows)


def _time_once(model: PreTrainedModel, passage: Tensor, prompt: Tensor, n_new_tokens: int) -> dict[str, float]:
    """Seconds of one prefill of `passage`, and of `n_new_tokens` decode steps after `prompt`."""
    passage, prompt = passage.to(model.device), prompt.to(model.device)
    start = _now(model)
    prefill(model, passage)
    prefill_seconds = _now(model) - start
    token, cache = prefill(model, prompt)
    start = _now(model)
    decode(model, token, cache, n_new_tokens)
    return {"prefill": prefill_seconds, "decode": _now(model) - start}


def _now(model: PreTrainedModel) -> float:
    """The clock in seconds, read when the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def summarise_speed(samples: pd.DataFrame) -> pd.DataFrame:
    """Medians and quartiles of `measure_speed`'s rows, and the speedup over the first model.

    The speedup is the median over repeats of (first model's seconds / this one's) in the same repeat: pairs
    taken close together share the machine's mood, so their ratio spreads less than the times do.

    Returns:
        One row per (model, phase): n_repeats, seconds, tokens_per_s and speedup, each of the last two with its
        quartiles (_q25, _q75).
    """
    wide = samples.pivot(index=["phase", "repeat"], columns="model", values="seconds")
    ratios = wide.rdiv(wide[samples["model"].iloc[0]], axis=0)
    rows = []
    for (name, phase), group in samples.groupby(["model", "phase"], sort=False):
        row = {"model": name, "phase": phase, "n_repeats": len(group), "seconds": group["seconds"].median()}
        for column, values in (("tokens_per_s", group["tokens_per_s"]), ("speedup", ratios.loc[phase, name])):
            row |= {column: values.median(), f"{column}_q25": values.quantile(0.25),
                    f"{column}_q75": values.quantile(0.75)}
        rows.append(row)
    return pd.DataFrame(rows)


def measure_peak_memory(checkpoint: Path, dtype: torch.dtype, *, batch_size: int, prefill_len: int, prompt_len: int,
                        n_new_tokens: int) -> dict[str, float]:
    """Peak memory of a fresh process that loads the checkpoint with plain transformers, prefills and decodes.

    On a CPU that is resident memory, the pages of the checkpoint file mapped while loading among it; on a GPU
    what torch allocated there.

    Returns:
        peak_mem_gib, and baseline_mem_gib: the same process before it loads the weights, so that the
        difference is the model's own share.

    Raises:
        SimDiffError: the process failed; its last line is in the sentence.
    """
    lengths = (batch_size, prefill_len, prompt_len, n_new_tokens)
    arguments = [str(Path(checkpoint).resolve()), str(dtype).removeprefix("torch."), *map(str, lengths)]
    return run_fresh("simdiff_utils.speed", arguments, f"Measuring the memory of {checkpoint}")


def _peak_gib() -> float:
    """Highest memory of this process so far, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_gib()


def _main() -> None:
    """Entry point of the fresh process."""
    parser = argparse.ArgumentParser(description="Print peak memory of one checkpoint in GiB, as JSON.")
    parser.add_argument("checkpoint")
    parser.add_argument("dtype")
    for name in ("batch_size", "prefill_len", "prompt_len", "n_new_tokens"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.checkpoint, local_files_only=True)
    with torch.device("meta"):  # brings in the model's code, so that the baseline holds it, without any weights
        AutoModelForCausalLM.from_config(config)
    baseline = _peak_gib()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype),
                                                 local_files_only=True).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    tokens = torch.randint(model.get_input_embeddings().weight.shape[0],
                           (args.batch_size, max(args.prefill_len, args.prompt_len)), device=model.device)
    prefill(model, tokens[:, :args.prefill_len])
    decode(model, *prefill(model, tokens[:, :args.prompt_len]), args.n_new_tokens)
    print(json.dumps({"peak_mem_gib": _peak_gib(), "baseline_mem_gib": baseline}))


if __name__ == "__main__":
    _main()
