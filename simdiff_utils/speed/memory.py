"""Peak memory of loading a checkpoint and running a protocol, in a fresh process of its own."""

from pathlib import Path

import torch

from simdiff_utils.engine.fresh import run_fresh
from simdiff_utils.engine.load import auto_class, load_folder, read_config
from simdiff_utils.models.own_code import trust_as_parent
from simdiff_utils.provenance import peak_memory_gib
from simdiff_utils.speed.generate import Protocol, decode, fill_cache, new_cache, prefill

_GIB = 2**30


def measure_peak_memory(checkpoint: Path, dtype: torch.dtype, protocol: Protocol) -> dict[str, float]:
    """What a fresh process takes that loads the checkpoint with plain transformers, reads the prompt and
    writes the last token of the protocol on a full KV cache.

    On a CPU that is resident memory, the pages of the checkpoint file mapped while loading among it; on a GPU
    what torch allocated there.

    Returns:
        in GiB: peak; baseline (the same process before it loads the weights); weights and kv_cache (their own
        sizes, the cache at its longest); other (peak less these three: activations, logits, a copy of the
        cache while it grows, mapped file pages; not below 0).

    Raises:
        SimDiffError: the process failed; its last line is in the sentence.
    """
    return run_fresh(
        "simdiff_utils.speed.memory:probe",
        f"Measuring the memory of {checkpoint}",
        checkpoint=str(Path(checkpoint).resolve()),
        dtype=str(dtype).removeprefix("torch."),
        batch_size=protocol.batch_size,
        prompt_len=protocol.prompt_len,
        n_new_tokens=protocol.n_new_tokens,
    )


def probe(
    checkpoint: str, dtype: str, batch_size: int, prompt_len: int, n_new_tokens: int
) -> dict[str, float]:
    """Load and run, in this process; see `measure_peak_memory`."""
    trust_as_parent()
    folder = Path(checkpoint)
    with torch.device("meta"):  # brings in the model's code, so that the baseline holds it, without weights
        config = read_config(folder)
        auto_class(config).from_config(config)
    baseline = _peak()
    model = load_folder(folder, dtype=getattr(torch, dtype))
    if torch.cuda.is_available():
        model.to("cuda")
    token, cache = prefill(model, torch.zeros(batch_size, prompt_len, dtype=torch.long, device=model.device))
    if n_new_tokens:
        cache = fill_cache(model, new_cache(model), batch_size, prompt_len + n_new_tokens - 1)
        decode(model, token, cache, 1)
    kept = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    weights, kv_cache = (sum(t.nbytes for t in tensors) / _GIB for tensors in (model.parameters(), kept))
    sizes, peak = {"baseline": baseline, "weights": weights, "kv_cache": kv_cache}, _peak()
    return {"peak": peak, **sizes, "other": max(0.0, peak - sum(sizes.values()))}


def _peak() -> float:
    """Highest memory of this process so far, in GiB."""
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else peak_memory_gib()
