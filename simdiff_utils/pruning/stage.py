"""What notebook 03 keeps on disk: the pruned checkpoint, and a copy of it where the user wants one."""

import math
import shutil
from pathlib import Path

from simdiff_utils import SimDiffError
from simdiff_utils.capture import stage as capture
from simdiff_utils.criterion import stage as criterion
from simdiff_utils.criterion.equations import fuse, normalise
from simdiff_utils.engine.decoder import open_decoder, stream_decoder
from simdiff_utils.engine.headers import weight_files
from simdiff_utils.engine.perplexity import perplexity
from simdiff_utils.files import check_disk, read_json, write_whole
from simdiff_utils.provenance import describe_machine
from simdiff_utils.pruning.export import export_pruned, refuse_existing, verify_export
from simdiff_utils.run import Run, check_n_remove, hash_blocks
from simdiff_utils.settings import ChoiceSettings, ReportSettings

ROOM = "simdiff_utils.pruning"
GROUPS = (*criterion.GROUPS, ChoiceSettings, ReportSettings)


def check_room(run: Run) -> None:
    """Refuse, before any work, an export that the disk cannot hold or that would overwrite something."""
    s = run.settings
    check_n_remove(s.n_remove, run.n_layers)
    dense = sum(file.stat().st_size for file in weight_files(run.checkpoint.folder))
    n_bytes = int(dense * (1 - s.n_remove / run.n_layers))
    if s.export_to:
        refuse_existing(export_target(run), s.overwrite)
        check_disk(export_target(run), n_bytes, "the pruned checkpoint")
    if not run.stage_folder("prune", ROOM, GROUPS).exists():
        check_disk(run.folder, n_bytes, "the pruned checkpoint")


def pruned_checkpoint(run: Run) -> Path:
    """Folder of the checkpoint without the chosen layers: the one that `settings.pruned` names, else made
    here (opened again and compared with the dense model before it appears)."""
    if run.settings.pruned:
        return _named_checkpoint(run)

    def make(folder: Path) -> dict:
        removed, dense = criterion.removed(run), run.decoder
        export_pruned(run.checkpoint.folder, removed, folder / "model", _facts(run))
        tight = dense.streamed or run.settings.memory_gib  # no second model beside the dense one
        exported = (stream_decoder if tight else open_decoder)(folder / "model", run.settings.dtype)
        difference = verify_export(dense, removed, exported, run.blocks("validation")[:1])
        kept = sorted(set(range(run.n_layers)) - removed)
        return {"removed": sorted(removed), "kept": kept, "reload_difference": difference}

    return run.stage("prune", ROOM, GROUPS, make) / "model"


def removed_layers(checkpoint: Path) -> frozenset[int]:
    """The layers that a checkpoint of ours lacks, 0-based in the model that it was cut from."""
    return frozenset(read_json(checkpoint / "pruning.json")["removed"])


def _named_checkpoint(run: Run) -> Path:
    """The checkpoint folder that `settings.pruned` names."""
    folder = Path(run.settings.pruned).expanduser()
    if not (folder / "pruning.json").is_file():
        raise SimDiffError(
            f"pruned = {run.settings.pruned} holds no pruning.json: name the checkpoint folder that notebook "
            '03 printed, or leave pruned = "" to make it.'
        )
    facts = read_json(folder / "pruning.json")
    if facts["origin"]["model_sha256"] != run.checkpoint.sha256:
        raise SimDiffError(
            f"pruned = {run.settings.pruned} was cut from {facts['model']}, and model names "
            f"{run.checkpoint.label} with other weights: name the model that it was cut from."
        )
    return folder


def copy_out(run: Run, checkpoint: Path) -> Path:
    """The checkpoint itself, or its copy at `settings.export_to` where that names a folder."""
    if not run.settings.export_to:
        return checkpoint
    target = export_target(run)
    refuse_existing(target, run.settings.overwrite)
    with write_whole(target) as partial:
        shutil.copytree(checkpoint, partial)
    return target


def export_target(run: Run) -> Path:
    """The folder that `settings.export_to` names; that of the dense model is refused."""
    target, dense = Path(run.settings.export_to).expanduser().resolve(), run.checkpoint.folder.resolve()
    if target in (dense, *dense.parents):
        raise SimDiffError(
            f"export_to = {run.settings.export_to} holds the dense model itself; name a folder of its own."
        )
    return target


def describe_test(run: Run) -> str:
    """What a perplexity of the test split is of."""
    s = run.settings
    return f"{s.n_test * (s.seq_len - 1):,} test tokens in windows of {s.seq_len}, {s.dtype}"


def _facts(run: Run) -> dict:
    """What `pruning.json` and the model card say of the set chosen; test perplexity chose nothing."""
    s, choice, table = run.settings, criterion.chosen(run), capture.statistics(run).table()
    alpha = None if math.isnan(choice["alpha"]) else choice["alpha"]
    scores = []  # of a criterion that scores no layers, or none that are comparable
    if alpha is not None:
        scores = fuse(*normalise(table, choice["proposed_by"]), alpha).tolist()
    elif s.criterion == "cosine":
        scores = table["cosine_distance"].tolist()
    sets = [frozenset(), frozenset(choice["removed"])]
    dense, pruned = map(perplexity, criterion.evaluator(run, "test").losses(sets))
    return {
        "model": run.checkpoint.label,
        "source": run.checkpoint.hub_id or str(run.checkpoint.folder.resolve()),
        "hub_id": run.checkpoint.hub_id,
        "card": run.checkpoint.card,
        "criterion": s.criterion,
        "alpha": alpha,
        "scores": scores,
        "statistics": table.to_dict(orient="list"),
        "calibration": f"{s.n_samples} samples of {s.seq_len} tokens of {run.corpus.label}",
        "calibration_sha256": hash_blocks(run.blocks("train")),
        "text": run.corpus.label,
        "machine": describe_machine(),
        "measured": {
            f"perplexity, dense ({describe_test(run)})": round(dense, 2),
            f"perplexity, pruned ({describe_test(run)})": round(pruned, 2),
        },
        "settings": s.of(*GROUPS),
        "origin": run.origin(),
    }
