"""What notebook 04 keeps on disk: one pruned model, healed in several ways, each with what it costs and wins
back.

The rungs of the ladder: the pruned model; a repair without training (`repair`); LoRA on the next token; LoRA
with distillation (`lora`); and a repair before either. `settings.repair` and `settings.training` name a rung.
"""

import shutil
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from transformers import PreTrainedModel

from simdiff_utils.criterion import stage as criterion
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import load_model, pick_dtype
from simdiff_utils.engine.perplexity import block_losses, perplexity
from simdiff_utils.files import read_json
from simdiff_utils.models.checkpoints import hash_checkpoint
from simdiff_utils.models.record import title
from simdiff_utils.pruning import stage as pruning
from simdiff_utils.pruning.card import write_adapter_card
from simdiff_utils.pruning.export import export_recovered, refuse_existing, restate_recovery
from simdiff_utils.recovery.lora import Trained, train_lora
from simdiff_utils.recovery.recipe import Recipe, recipe_for
from simdiff_utils.recovery.repair import repair
from simdiff_utils.recovery.training_rows import TrainingRows, block_rows, load_rows
from simdiff_utils.run import Run, is_sound
from simdiff_utils.settings import (
    CaptureSettings,
    ChatSettings,
    RepairSettings,
    ReportSettings,
    TrainingSettings,
)
from simdiff_utils.text.blocks import draw_blocks, token_blocks

ROOM = "simdiff_utils.recovery"
REPAIR = (CaptureSettings, RepairSettings)
RECOVERY = (*REPAIR, TrainingSettings, ChatSettings)


def rung_name(run: Run) -> str:
    """What the recovery is called in tables and pictures."""
    parts = [part for part in (run.settings.repair, run.settings.training) if part != "none"]
    return " + ".join(parts) or "pruned"


def removed(run: Run) -> frozenset[int]:
    """The layers that the pruned checkpoint lacks."""
    return pruning.removed_layers(pruning.pruned_checkpoint(run))


def recovered_checkpoint(run: Run) -> Path:
    """Folder of the healed checkpoint (the pruned one where nothing is asked for), copied to `export_to`."""
    if run.settings.export_to:
        refuse_existing(pruning.export_target(run), run.settings.overwrite)
    if run.settings.training != "none":
        train(run)  # by all processes together
    with PartialState().main_process_first():
        made = healed_checkpoint(run)
        return pruning.copy_out(run, made) if PartialState().is_main_process else made


def healed_checkpoint(run: Run) -> Path:
    """The same in the run folder alone, whatever `settings.export_to` says."""
    healed = (run.settings.repair, run.settings.training) != ("none", "none")
    return _healed_folder(run) / "model" if healed else pruning.pruned_checkpoint(run)


def _healed_folder(run: Run) -> Path:
    """Stage healed: the weights that repair and training left, and what they give on the test split."""
    s = run.settings
    made = repaired_checkpoint(run) if s.training == "none" else train(run) / "model"

    def make(folder: Path) -> dict:
        model = Decoder(load_model(made, s.dtype))
        (found,) = block_losses(model, run.blocks("test"), batch_size=s.batch_size)
        what = f"perplexity, {rung_name(run)} ({pruning.describe_test(run)})"
        restate_recovery(made, folder / "model", {what: round(perplexity(found), 2)})
        return {"losses": found.tolist(), "cost": _cost(run)}

    return run.stage("healed", ROOM, (*RECOVERY, ReportSettings), make, weights=hash_checkpoint(made))


# ---- repair --------------------------------------------------------------------------------------


def repaired_checkpoint(run: Run) -> Path:
    """Stage repair: folder of the pruned checkpoint, repaired without training where that is asked for."""
    if run.settings.repair == "none":
        return pruning.pruned_checkpoint(run)
    return _repair_folder(run) / "model"


def _repair_folder(run: Run) -> Path:
    pruned, s = pruning.pruned_checkpoint(run), run.settings

    def make(folder: Path) -> dict:
        model = load_model(pruned, "float32")
        given = run.blocks("train"), s.batch_size, s.repair
        cuts = repair(run.decoder, model, pruning.removed_layers(pruned), *given)
        cuts.to_csv(folder / "cuts.csv", index=False)
        healed = f"{cuts['layer_idx'].notna().sum()} of {len(cuts)} cuts"
        facts = {"repair": f"{s.repair}, without training, at {healed}"}
        _export(run, model, pruned, folder, facts)
        notes = [f"Layers {row.first} to {row.last}: {row.note}" for row in cuts.itertuples() if row.note]
        return {"n_tokens": s.n_samples * s.seq_len, "notes": notes}

    return run.stage("repair", ROOM, REPAIR, make, pruned=hash_checkpoint(pruned))


# ---- training ------------------------------------------------------------------------------------


def recipe(run: Run) -> Recipe:
    """The preset's recipe with the values that the settings give."""
    s = run.settings
    return recipe_for(
        s.preset,
        data=s.train_data if s.train_data != "preset" else "",
        learning_rate=s.learning_rate,
        max_steps=s.max_steps,
        micro_batch_size=s.micro_batch_size,
        max_length=s.max_length,
        target_modules=tuple(s.target_modules),
        gradient_checkpointing=s.gradient_checkpointing,
        report_to=s.report_to,
    )


def training_rows(run: Run) -> TrainingRows:
    """What the recipe trains on, and what it evaluates on."""
    plan, s = recipe(run), run.settings
    if plan.data != "text":
        return load_rows(
            plan.data, run.tokenizer, plan.max_length, s.seed, plan.n_validation, s.chat_template
        )
    shared = plan.max_length == s.seq_len  # then the calibration samples have been drawn from the same blocks
    documents = run.corpus.documents["train"]
    blocks = run.split_blocks("train") if shared else token_blocks(run.tokenizer, documents, plan.max_length)
    n_wanted = plan.batch_size * plan.max_steps or len(blocks)
    drawn = draw_blocks(blocks, min(n_wanted, len(blocks)), s.seed)
    return block_rows(drawn, run.blocks("validation"), run.tokenizer)


def train(run: Run) -> Path:
    """Stage recovery: folder with `model/` (merged), `adapter/`, `log.csv`, `curves/` where asked for, and
    facts.

    While training its checkpoints lie beside it; a run that was killed goes on from the last one. Under
    `accelerate launch` the main process alone writes.
    """
    state = PartialState()
    with state.main_process_first():
        start = repaired_checkpoint(run.replace(export_dtype="float32"))
    key = {"start": hash_checkpoint(start), "n_validation": run.settings.n_validation}
    target = run.stage_folder("recovery", ROOM, RECOVERY, **key)
    if is_sound(target):
        return target
    rows, work = training_rows(run), run.folder / f"training-{target.name.removeprefix('recovery-')}"
    trained = _train(run, start, rows, work)
    if state.is_main_process:
        run.stage(
            "recovery", ROOM, RECOVERY, lambda folder: _write(run, trained, rows, start, work, folder), **key
        )
        shutil.rmtree(work)
    state.wait_for_everyone()
    return target


def _train(run: Run, start: Path, rows: TrainingRows, work: Path) -> Trained:
    s, dtype = run.settings, pick_dtype(run.settings.train_dtype)
    teacher = None
    if s.training == "distillation":
        same = run.model.dtype == dtype
        teacher = run.decoder if same else Decoder(load_model(run.checkpoint.folder, s.train_dtype))
    model = load_model(start, "float32")
    # what an adapter's config names as its base: no path of this machine, nor the dense model's hub id, on
    # whose layers the adapter would be put without a word
    model.name_or_path = title(read_json(start / "pruning.json"))
    return train_lora(model, run.tokenizer, rows, recipe(run), work, dtype, s.seed, teacher)


def _write(run: Run, trained: Trained, rows: TrainingRows, start: Path, work: Path, folder: Path) -> dict:
    """The stage's files; its facts."""
    dtype = str(pick_dtype(run.settings.train_dtype)).removeprefix("torch.")
    last_step, held_out = trained.log.iloc[-1], trained.log["eval_loss"].dropna()
    n_steps, before, after = int(last_step["step"]), held_out.iloc[0], held_out.iloc[-1]
    trained.log.to_csv(folder / "log.csv", index=False)
    shutil.copytree(work, folder, dirs_exist_ok=True)
    what = "LoRA with distillation" if run.settings.training == "distillation" else "LoRA"
    facts = {
        "recovery": f"{what}, {n_steps} steps, {dtype}, {rows.template}",
        "loss on held-out rows, before and after": f"{before:.3f}, {after:.3f} nats per token",
    }
    _export(run, trained.model, start, folder, facts)
    write_adapter_card(folder / "adapter", folder / "model")
    return {
        "n_trained": trained.n_trained,
        "n_parameters": trained.model.num_parameters(),
        "n_steps": n_steps,
        "n_tokens": int(last_step["tokens"]),
        "train_seconds": last_step["seconds"],
        "dtype": dtype,
        "template": rows.template,
        "notes": list(rows.notes),
    }


def _export(run: Run, model: PreTrainedModel, start: Path, folder: Path, facts: dict) -> None:
    dtype = pick_dtype(run.settings.export_dtype)
    for parameter in model.parameters():  # buffers stay as they are: a reload has them in full precision, too
        parameter.data = parameter.data.to(dtype)
    export_recovered(model, start, folder / "model", facts, run.blocks("validation")[:1])


# ---- the ladder ----------------------------------------------------------------------------------


def compare_rungs(run: Run, rungs: list[tuple[str, str]]) -> pd.DataFrame:
    """Each rung on the test split, the dense model first.

    Args:
        rungs: pairs of `repair` and `training`; ("none", "none") is the pruned model, which is always there.

    Returns:
        one row per model: rung, perplexity, seconds (of repair and training), n_tokens (that repair and
        training saw), n_trained (parameters), share (of the log-perplexity lost that is back; 1 would be the
        dense model's).
    """
    dense, pruned = (perplexity(criterion.losses(run, "test", s)) for s in (frozenset(), removed(run)))
    rows = [{"rung": "dense", "perplexity": dense}, {"rung": "pruned", "perplexity": pruned}]
    for pair in dict.fromkeys(rungs):
        if pair != ("none", "none"):
            other = run.replace(repair=pair[0], training=pair[1])
            facts = read_json(_healed_folder(other) / "result.json")
            value = perplexity(np.array(facts["losses"]))
            rows.append({"rung": rung_name(other), "perplexity": value} | facts["cost"])
    table = pd.DataFrame(rows, columns=["rung", "perplexity", "seconds", "n_tokens", "n_trained"]).fillna(0)
    lost = np.log(table["perplexity"]) - log(dense)
    table = table.astype({"n_tokens": int, "n_trained": int})
    return table.assign(share=1 - lost / (log(pruned) - log(dense)))


def _cost(run: Run) -> dict:
    """What the recovery took: seconds, n_tokens, n_trained."""
    total = {"seconds": 0.0, "n_tokens": 0, "n_trained": 0}
    if run.settings.repair != "none":
        facts = read_json(_repair_folder(run) / "result.json")
        total |= {"seconds": facts["seconds"], "n_tokens": facts["n_tokens"]}
    if run.settings.training != "none":
        facts = read_json(train(run) / "result.json")
        total["seconds"] += facts["train_seconds"]
        total["n_tokens"] += facts["n_tokens"]
        total["n_trained"] = facts["n_trained"]
    return total
