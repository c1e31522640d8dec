"""What stands beside exported weights: tokenizer, chat template, `pruning.json`, the model card."""

from pathlib import Path

import transformers
from huggingface_hub import ModelCardData

from simdiff_utils.engine.load import auto_class, read_config
from simdiff_utils.files import read_json, write_json
from simdiff_utils.models.checkpoints import copy_companions
from simdiff_utils.models.record import title, was_healed
from simdiff_utils.pruning.other_tools import OTHER_IN_LLAMA_CPP

_CARD = """---
{head}
---
# {title}

{model} with layers {removed} taken out (0-based indices of the original); {kept} of {n_layers} layers are
left, their weights {weights}. Chosen by {criterion}{alpha}, measured on {calibration}.
{turns}
| measured | |
|---|---|
{measured}

Model and text: {model}; {text}. Machine: {machine}. Perplexity on one text is not capability: measure your
own task.

```python
from transformers import {loader}, AutoTokenizer
model, tokenizer = {loader}.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

`pruning.json` holds indices, scores, settings, hashes and versions.{same_cut}

Made with the SimDiff workbook, after [SimDiff](https://arxiv.org/abs/2604.19520), and opened again with
transformers {version}. Which other tools were tried, and with which versions: the workbook's README.
"""


def write_companions(source: Path, folder: Path, facts: dict) -> None:
    """What goes with the weights as it is (see `copy_companions`), `pruning.json` and the model card."""
    copy_companions(source, folder)
    write_json(folder / "pruning.json", facts)
    (folder / "README.md").write_text(_write_card(facts, _loader(folder)), encoding="utf-8")


_ADAPTER_CARD = """---
{head}
---
# LoRA adapter for {title}

It belongs to the pruned model, layers {removed} of {model} taken out (0-based indices of the original), and
to no other: on the original its weights would lie on other layers. {recovery}.

```python
from peft import PeftModel
from transformers import {loader}
model = PeftModel.from_pretrained({loader}.from_pretrained("PRUNED"), ".")
```

PRUNED: the folder or hub id of the pruned model that it was trained on, whose `pruning.json` says what it is.

Made with the SimDiff workbook, after [SimDiff](https://arxiv.org/abs/2604.19520); `adapter_config.json` names
no model that could be opened in its place.
"""


def write_adapter_card(folder: Path, healed: Path) -> None:
    """The model card of adapters, beside which the model that they healed lies."""
    facts, loader = read_json(healed / "pruning.json"), _loader(healed)
    said = _ADAPTER_CARD.format(
        head=_metadata(facts, loader, library_name="peft", base_model_relation="adapter"),
        title=title(facts),
        removed=", ".join(map(str, facts["removed_of_first"])),
        model=facts["model"],
        recovery=facts["recovery"]["recovery"],
        loader=loader,
    )
    (folder / "README.md").write_text(said, encoding="utf-8")


def _loader(folder: Path) -> str:
    """transformers' class that opens a checkpoint."""
    return auto_class(read_config(folder)).__name__


def _metadata(facts: dict, loader: str, **others: str) -> str:
    """What the hub reads of a card: YAML."""
    task = "text-generation" if "Causal" in loader else "image-text-to-text"
    base = {"base_model": facts["hub_id"]} if facts["hub_id"] else {}
    known = base | facts.get("card", {}) | others
    return ModelCardData(pipeline_tag=task, tags=["depth-pruning", "simdiff"], **known).to_yaml()


def _write_turn(turn: dict) -> str:
    """A cut made earlier, in indices of the model that it was made from."""
    removed = ", ".join(map(str, turn["removed"]))
    recovery = (
        f", then recovered ({'; '.join(map(str, turn['recovery'].values()))})" if "recovery" in turn else ""
    )
    return f"\nEarlier cut: layers {removed} of {turn['n_layers']}, by {turn['criterion']}{recovery}.\n"


def _write_card(facts: dict, loader: str) -> str:
    """The model card, in Markdown.

    Args:
        facts: model, source (hub id or folder), hub_id (or None), card (of the source), criterion, alpha
            (or None), calibration (words), measured {words: value}, text, machine; recovery {words: value}
            for one whose weights were changed.
        loader: transformers' class that opens the folder.
    """
    measured = facts["measured"] | facts.get("recovery", {})
    recovered = "recovery" in facts
    weights = "as an earlier recovery left them" if was_healed(facts) else "unchanged"
    cut_elsewhere = " `mergekit.yaml` makes this cut elsewhere, for the families that it names"
    if facts["keeps_pattern"]:
        cut_elsewhere += ", and so does `llama_quantize.txt`."
    else:
        cut_elsewhere += f". {OTHER_IN_LLAMA_CPP}"
    as_they_are = ("model", "criterion", "calibration", "text", "machine")
    return _CARD.format(
        head=_metadata(facts, loader, library_name="transformers"),
        version=transformers.__version__,
        title=title(facts),
        n_layers=facts["n_layers_of_first"],
        weights=weights + (" before the recovery" if recovered else ""),
        turns="".join(_write_turn(turn) for turn in facts["earlier"]),
        removed=", ".join(map(str, facts["removed_of_first"])) or "none",
        kept=len(facts["kept"]),
        alpha="" if facts["alpha"] is None else f" at alpha = {facts['alpha']:.3g}",
        measured="\n".join(f"| {name} | {value} |" for name, value in measured.items()),
        same_cut="" if recovered else cut_elsewhere,
        loader=loader,
        **{name: facts[name] for name in as_they_are},
    )
