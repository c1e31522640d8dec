"""The same cut for mergekit and llama.cpp, where they make the same of it."""

import json
from pathlib import Path

from simdiff_utils.engine.surgery import keep
from simdiff_utils.models.record import was_healed

OTHER_IN_LLAMA_CPP = (
    "llama.cpp would run another model: in most families it knows the kinds of layers (sliding or full "
    "attention, with or without rotary embeddings) by their places, and here they stand in others."
)
_LLAMA_QUANTIZE = """# The same cut by llama.cpp, from {model} ({n_layers} layers) in GGUF:
llama-quantize --prune-layers {layers} DENSE.gguf PRUNED.gguf COPY
"""
_MERGEKIT = """# The same cut of {model} ({n_layers} layers) by mergekit: mergekit-yaml mergekit.yaml OUTPUT
# Tried with mergekit 0.1.5 (make test-interop): the same tensors and number of layers for Llama, Mistral,
# GPT-2, Phi, Phi-3, OLMo 2, Granite, StableLM, StarCoder2, Gemma and GLM-4. It aborts, or keeps the old
# number of layers, for Qwen2, Qwen3, Gemma 2, Gemma 3, Cohere, Falcon, GPT-NeoX, GPT-Neo, SmolLM3, OLMo 3,
# EXAONE 4, OPT, Nemotron and mixtures of experts. Others were not tried.
# A model that is no hub id is a folder of the machine where this was written.
slices:
{slices}
merge_method: passthrough
dtype: {dtype}
"""


def write_other_tools(folder: Path, facts: dict, dtype: str) -> None:
    """The same cut for mergekit and llama.cpp: of the first model, or of the last one that was healed."""
    which = "{}" if was_healed(facts) else "{}_of_first"
    n_layers, removed = (facts[which.format(name)] for name in ("n_layers", "removed"))
    of = {"model": json.dumps(facts["source"]), "n_layers": n_layers}
    slices = "\n".join(_slices(keep(frozenset(removed), n_layers), facts["source"]))
    mergekit = _MERGEKIT.format(dtype=dtype, slices=slices, **of)
    (folder / "mergekit.yaml").write_text(mergekit, encoding="utf-8")
    quantize = f"# {OTHER_IN_LLAMA_CPP}\n"
    if facts["keeps_pattern"]:
        quantize = _LLAMA_QUANTIZE.format(layers=",".join(map(str, removed)), **of)
    (folder / "llama_quantize.txt").write_text(quantize, encoding="utf-8")


def _slices(kept: list[int], model: str) -> list[str]:
    """One mergekit source for each run of neighbouring layers; its end is exclusive."""
    starts = [i for i in kept if i - 1 not in kept]
    ends = [i + 1 for i in kept if i + 1 not in kept]
    return [
        f"  - sources:\n      - model: {json.dumps(model)}\n        layer_range: [{start}, {end}]"
        for start, end in zip(starts, ends, strict=True)
    ]
