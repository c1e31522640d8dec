"""What `pruning.json` keeps of every cut since the first model: one that was pruned may be pruned again."""

from pathlib import Path

from simdiff_utils.files import read_json

_TURN = ("criterion", "alpha", "n_layers", "removed", "recovery")  # what is kept of a cut made earlier


def extend_record(source: Path, facts: dict) -> dict:
    """The facts of a cut, with those of the cuts and recoveries that its source went through.

    Args:
        source: the checkpoint that was cut; of ours, if it holds a `pruning.json`.
        facts: of this cut: `removed` and `kept` are indices of the source, which has `n_layers`.

    Returns:
        facts, and: model, hub_id (of the first model), n_layers_of_first, removed_of_first (every layer that
        it lost by now), earlier (the cuts before, each in indices of what it was made from; with `recovery`
        where it was healed). source is the first model's, too, as long as no weight was changed.
    """
    file = source / "pruning.json"
    before = read_json(file) if file.is_file() else None
    if before is None:
        first = {"n_layers_of_first": facts["n_layers"], "removed_of_first": facts["removed"], "earlier": []}
        return facts | first
    n_first = before.get("n_layers_of_first", before["n_layers"])
    lost = set(before.get("removed_of_first", before["removed"]))
    standing = [layer_idx for layer_idx in range(n_first) if layer_idx not in lost]
    turns = [*before.get("earlier", []), {name: before[name] for name in _TURN if name in before}]
    record = {
        "model": before["model"],
        "hub_id": before["hub_id"],
        "n_layers_of_first": n_first,
        "removed_of_first": sorted({*range(n_first)} - {standing[layer_idx] for layer_idx in facts["kept"]}),
        "earlier": turns,
    }
    healed = any("recovery" in turn for turn in turns)
    return facts | record | ({} if healed else {"source": before["source"]})
