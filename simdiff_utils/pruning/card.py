"""What stands beside exported weights: tokenizer, chat template, `pruning.json`, the model card."""

import shutil
from pathlib import Path

from simdiff_utils.files import write_json
from simdiff_utils.models.names import CODE_FILES
from simdiff_utils.models.own_code import needs_own_code

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
_OURS = {"config.json", "pruning.json", "llama_quantize.txt"}  # written anew
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [depth-pruning, simdiff]{base_model}
---
# {title}

{model} with layers {removed} taken out (0-based indices of the original); {kept} of {n_layers} layers are
left, their weights unchanged{recovered}. Chosen by {criterion}{alpha}, measured on {calibration}.

| measured | |
|---|---|
{measured}

Model and text: {model}; {text}. Machine: {machine}. Perplexity on one text is not capability: measure your
own task.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

`pruning.json` holds indices, scores, settings, hashes and versions.{same_cut}
"""


def write_companions(source: Path, folder: Path, facts: dict) -> None:
    """Tokenizer, chat template, generation config and code of its own as they are; `pruning.json` and the
    model card."""
    for pattern in (*_COMPANIONS, *(CODE_FILES if needs_own_code(source) else ())):
        for file in source.glob(pattern):
            if file.name not in _OURS and not file.name.endswith(".index.json"):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    write_json(folder / "pruning.json", facts)
    (folder / "README.md").write_text(_write_card(facts), encoding="utf-8")


def _write_card(facts: dict) -> str:
    """The model card, in Markdown.

    Args:
        facts: model, source (hub id or folder name), hub_id (or None), criterion, alpha (or None),
            calibration (words), measured {words: value}, text, machine; recovery {words: value} for one whose
            weights were changed.
    """
    measured = facts["measured"] | facts.get("recovery", {})
    removed, recovered = facts["removed"], "recovery" in facts
    cut_elsewhere = " `mergekit.yaml` and `llama_quantize.txt` make this cut elsewhere."
    as_they_are = ("model", "n_layers", "criterion", "calibration", "text", "machine")
    return _CARD.format(
        base_model=f"\nbase_model: {facts['hub_id']}" if facts["hub_id"] else "",
        title=f"{facts['model']} without {len(removed)} of {facts['n_layers']} layers",
        removed=", ".join(map(str, removed)) or "none",
        kept=len(facts["kept"]),
        recovered=" before the recovery" if recovered else "",
        alpha="" if facts["alpha"] is None else f" at alpha = {facts['alpha']:.3g}",
        measured="\n".join(f"| {name} | {value} |" for name, value in measured.items()),
        same_cut="" if recovered else cut_elsewhere,
        **{name: facts[name] for name in as_they_are},
    )
