"""What `pruning.json` keeps of every cut since the first model: one that was pruned may be pruned again."""

from pathlib import Path

from simdiff_utils.files import read_json

_TURN = ("criterion", "alpha", "n_layers", "removed", "recovery")  # what is kept of a cut made earlier


def read_record(folder: Path) -> dict | None:
    """What the `pruning.json` of a checkpoint of ours says; None for any other checkpoint."""
    file = folder / "pruning.json"
    return _since_first(read_json(file)) if file.is_file() else None


def _since_first(facts: dict) -> dict:
    """The facts of a cut, which is the first one where they do not say otherwise."""
    return {
        "n_layers_of_first": facts["n_layers"],
        "removed_of_first": facts["removed"],
        "earlier": [],
    } | facts


def title(facts: dict) -> str:
    """The first model, and how many of its layers are gone by now."""
    n_removed, n_layers = len(facts["removed_of_first"]), facts["n_layers_of_first"]
    return f"{facts['model']} without {n_removed} of {n_layers} layers"


def was_healed(facts: dict) -> bool:
    """Whether weights were changed before this cut: it can be made of the healed checkpoint alone."""
    return any("recovery" in turn for turn in facts["earlier"])


def extend_record(source: Path, facts: dict) -> dict:
    """The facts of a cut, with those of the cuts and recoveries that its source went through.

    Args:
        source: the checkpoint that was cut; of ours, if it holds a `pruning.json`.
        facts: of this cut: `removed` and `kept` are indices of the source, which has `n_layers`.

    Returns:
        facts, and: model, hub_id, card (of the first model), keeps_pattern (by every cut), n_layers_of_first,
        removed_of_first (every layer that it lost by now), earlier (the cuts before, each in indices of what
        it was made from; with `recovery` where it was healed). source is the first model's, too, as long as
        no weight was changed.
    """
    before = read_record(source)
    if before is None:
        return _since_first(facts)
    n_first = before["n_layers_of_first"]
    standing = [layer_idx for layer_idx in range(n_first) if layer_idx not in before["removed_of_first"]]
    turn = {name: before[name] for name in _TURN if name in before}
    record = {
        "model": before["model"],
        "hub_id": before["hub_id"],
        "card": before.get("card", {}),
        "keeps_pattern": facts["keeps_pattern"] and before.get("keeps_pattern", False),
        "n_layers_of_first": n_first,
        "removed_of_first": sorted({*range(n_first)} - {standing[layer_idx] for layer_idx in facts["kept"]}),
        "earlier": [*before["earlier"], turn],
    }
    return facts | record | ({} if was_healed(record) else {"source": before["source"]})
