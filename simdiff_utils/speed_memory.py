"""Peak memory of loading a checkpoint and running a protocol, in a fresh process of its own."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from simdiff_utils.own_code import trust_as_parent
from simdiff_utils.results import peak_memory_gib, run_fresh
from simdiff_utils.speed import Protocol, decode, fill_cache, prefill

_GIB = 2**30


def measure_peak_memory(checkpoint: Path, dtype: torch.dtype, protocol: Protocol) -> dict[str, float]:
    """What a fresh process takes that loads the checkpoint with plain transformers, reads the prompt and writes the last
    token of the protocol on a full KV cache.

    On a CPU that is resident memory, the pages of the checkpoint file mapped while loading among it; on a GPU
    what torch allocated there.

    Returns:
        in GiB: peak; baseline (the same process before it loads the weights); weights and kv_cache (their own sizes, the
        cache at its longest); other (peak less these three: activations, logits, a copy of the cache while it grows,
        mapped file pages; not below 0).

    Raises:
        SimDiffError: the process failed; its last line is in the sentence.
    """
    sizes = (protocol.batch_size, protocol.prompt_len, protocol.n_new_tokens)
    arguments = [str(Path(checkpoint).resolve()), str(dtype).removeprefix("torch."), *map(str, sizes)]
    return run_fresh("simdiff_utils.speed_memory", arguments, f"Measuring the memory of {checkpoint}")


def _peak() -> float:
    """Highest memory of this process so far, in GiB."""
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else peak_memory_gib()


def _main() -> None:
    """Entry point of the fresh process."""
    parser = argparse.ArgumentParser(description="Print peak memory of one checkpoint in GiB, as JSON.")
    parser.add_argument("checkpoint")
    parser.add_argument("dtype")
    for name in ("batch_size", "prompt_len", "n_new_tokens"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    trust_as_parent()
    config = AutoConfig.from_pretrained(args.checkpoint, local_files_only=True)
    with torch.device("meta"):  # brings in the model's code, so that the baseline holds it, without any weights
        AutoModelForCausalLM.from_config(config)
    baseline = _peak()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype), use_safetensors=True,
                                                 local_files_only=True).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    token, cache = prefill(model, torch.zeros(args.batch_size, args.prompt_len, dtype=torch.long, device=model.device))
    if args.n_new_tokens:
        cache = fill_cache(model, DynamicCache(config=model.config), args.batch_size,
                           args.prompt_len + args.n_new_tokens - 1)
        decode(model, token, cache, 1)
    sizes = {"baseline": baseline, "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / _GIB,
             "kv_cache": sum(s.numel() * s.element_size() for layer in cache.layers
                             for s in (layer.keys, layer.values)) / _GIB}
    peak = _peak()
    print(json.dumps({"peak": peak, **sizes, "other": max(0.0, peak - sum(sizes.values()))}))


if __name__ == "__main__":
    _main()
