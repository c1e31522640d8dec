"""The ladder of recovery: one pruned model, healed in several ways, each with what it costs and what it wins
back.

Rung 0 is the pruned model; then a repair without training (`repair`), LoRA on the next token, LoRA with
distillation (`recovery`), and a repair before either.
"""

import copy
import shutil
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState

from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import load_model, pick_dtype
from simdiff_utils.engine.perplexity import block_losses, perplexity
from simdiff_utils.files import read_json
from simdiff_utils.pruning.export import export_recovered, refuse_existing
from simdiff_utils.recovery.data import TrainingRows, block_rows, load_rows
from simdiff_utils.recovery.lora import Recipe, recipe_for, train_lora
from simdiff_utils.recovery.repair import repair
from simdiff_utils.run import is_sound
from simdiff_utils.stages import PRUNE, Run
from simdiff_utils.text.blocks import draw_blocks, token_blocks

_REPAIR = (*PRUNE, "repair", "export_dtype")
_RECOVERY = (
    *_REPAIR,
    "training",
    "preset",
    "train_data",
    "chat_template",
    "learning_rate",
    "max_steps",
    "micro_batch_size",
    "max_length",
    "target_modules",
    "train_dtype",
    "gradient_checkpointing",
    "report_to",
)


class Ladder(Run):
    """A run that heals what it pruned, as `settings.repair` and `settings.training` say."""

    def rung(self, repair: str, training: str) -> "Ladder":
        """The same run with another recovery; what was loaded or computed is shared."""
        return self._with(repair=repair, training=training)

    @property
    def name(self) -> str:
        """What the recovery is called in tables and pictures."""
        parts = [part for part in (self.settings.repair, self.settings.training) if part != "none"]
        return " + ".join(parts) or "pruned"

    def recovered_checkpoint(self) -> Path:
        """Folder of the healed checkpoint; the pruned one where nothing is asked for."""
        if self.settings.export_to:
            refuse_existing(self._export_target(), self.settings.overwrite)
        made, state = self.without_copy(), PartialState()
        with state.main_process_first():
            return self.exported(made) if state.is_main_process else made

    def without_copy(self) -> Path:
        """The same in the run folder alone, whatever `settings.export_to` says."""
        return self.repaired_checkpoint() if self.settings.training == "none" else self.recovery() / "model"

    def recovery(self) -> Path:
        """Stage recovery: folder with `model/` (merged), `adapter/`, `log.csv`, `curves/` where asked for,
        and facts.

        While training its checkpoints lie beside it; a run that was killed goes on from the last one.
        """
        s, dtype = self.settings, pick_dtype(self.settings.train_dtype)
        target = self._folder("recovery", _RECOVERY)
        if is_sound(target):
            return target
        with PartialState().main_process_first():
            start = self._with(export_dtype="float32").repaired_checkpoint()
        rows = self.training_rows()
        work = self.folder / f"training-{target.name.removeprefix('recovery-')}"
        teacher = None
        if s.training == "distillation":
            same = self.model.dtype == dtype
            teacher = self.decoder if same else Decoder(load_model(self.checkpoint.folder, s.train_dtype))
        trained = train_lora(
            load_model(start, "float32"), self.tokenizer, rows, self.recipe, work, dtype, s.seed, teacher
        )

        def make(folder: Path) -> dict:
            steps, last = trained.log.iloc[-1], trained.log["eval_loss"].dropna()
            trained.log.to_csv(folder / "log.csv", index=False)
            shutil.copytree(work, folder, dirs_exist_ok=True)
            what = "LoRA with distillation" if teacher else "LoRA"
            export_recovered(
                trained.model.to(pick_dtype(s.export_dtype)),
                start,
                folder / "model",
                {
                    "recovery": f"{what}, {int(steps['step'])} steps, {dtype}, {rows.template}".replace(
                        "torch.", ""
                    ),
                    "loss on held-out rows, before and after": f"{last.iloc[0]:.3f}, {last.iloc[-1]:.3f} nats per token",
                },
            )
            return {
                "n_trained": trained.n_trained,
                "n_parameters": trained.model.num_parameters(),
                "n_steps": int(steps["step"]),
                "n_tokens": int(steps["tokens"]),
                "train_seconds": steps["seconds"],
                "dtype": str(dtype).removeprefix("torch."),
                "template": rows.template,
                "notes": list(rows.notes),
            }

        if PartialState().is_main_process:
            self._stage("recovery", _RECOVERY, make)
            shutil.rmtree(work)
        PartialState().wait_for_everyone()
        return target

    def repaired_checkpoint(self) -> Path:
        """Stage repair: folder of the pruned checkpoint, repaired without training where that is asked
        for."""
        pruned = self._with(export_to="").pruned_checkpoint()
        if self.settings.repair == "none":
            return pruned

        def make(folder: Path) -> dict:
            model = load_model(pruned, "float32")
            cuts = repair(
                self.decoder,
                model,
                self.removed(),
                self.blocks("train"),
                self.settings.batch_size,
                self.settings.repair,
            )
            cuts.to_csv(folder / "cuts.csv", index=False)
            export_recovered(
                model.to(pick_dtype(self.settings.export_dtype)),
                pruned,
                folder / "model",
                {
                    "repair": f"{self.settings.repair}, without training, at {cuts['layer_idx'].notna().sum()} of "
                    f"{len(cuts)} cuts"
                },
            )
            return {
                "n_tokens": self.settings.n_samples * self.settings.seq_len,
                "notes": [
                    f"Layers {row.first} to {row.last}: {row.note}" for row in cuts.itertuples() if row.note
                ],
            }

        return self._stage("repair", _REPAIR, make) / "model"

    @property
    def recipe(self) -> Recipe:
        """The preset's recipe with the values that the settings give."""
        s = self.settings
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

    def training_rows(self) -> TrainingRows:
        """What the recipe trains on, and what it evaluates on."""
        recipe, s = self.recipe, self.settings
        if recipe.data != "text":
            return load_rows(
                recipe.data, self.tokenizer, recipe.max_length, s.seed, recipe.n_validation, s.chat_template
            )
        shared = (
            recipe.max_length == s.seq_len
        )  # then the calibration samples have been drawn from the same blocks
        blocks = (
            self.split_blocks("train")
            if shared
            else token_blocks(self.tokenizer, self.corpus.documents["train"], recipe.max_length)
        )
        n_wanted = recipe.batch_size * recipe.max_steps or len(blocks)
        return block_rows(
            draw_blocks(blocks, min(n_wanted, len(blocks)), s.seed), self.blocks("validation"), self.tokenizer
        )

    def compare_rungs(self, rungs: list[tuple[str, str]]) -> pd.DataFrame:
        """Each rung on the test split, the dense model first.

        Args:
            rungs: pairs of `repair` and `training`; ("none", "none") is the pruned model, which is always
                there.

        Returns:
            one row per model: rung, seconds (of repair and training), n_tokens (that repair and training
            saw), n_trained (parameters), perplexity, share (of the log-perplexity lost that is back; 1 would
            be the dense model's).
        """
        dense, pruned = (
            perplexity(self.losses("test", removed)) for removed in (frozenset(), self.removed())
        )
        rows = [{"rung": "dense", "perplexity": dense}, {"rung": "pruned", "perplexity": pruned}]
        for rung in (self.rung(*pair) for pair in dict.fromkeys(rungs) if pair != ("none", "none")):
            rows.append({"rung": rung.name, "perplexity": perplexity(rung.recovered_losses())} | rung.costs())
        table = pd.DataFrame(rows, columns=["rung", "perplexity", "seconds", "n_tokens", "n_trained"]).fillna(
            0
        )
        lost = np.log(table["perplexity"]) - log(dense)
        return table.astype({"n_tokens": int, "n_trained": int}).assign(
            share=1 - lost / (log(pruned) - log(dense))
        )

    def recovered_losses(self) -> np.ndarray:
        """Losses of the healed checkpoint, as it was written, on the blocks of the test split, float64
        [n]."""
        model = load_model(self.without_copy(), self.settings.dtype)
        return block_losses(Decoder(model), self.blocks("test"), batch_size=self.settings.batch_size)

    def costs(self) -> dict:
        """What the recovery took: seconds, n_tokens, n_trained."""
        costs = {"seconds": 0.0, "n_tokens": 0, "n_trained": 0}
        if self.settings.repair != "none":
            facts = read_json(self._folder("repair", _REPAIR) / "result.json")
            costs |= {"seconds": facts["seconds"], "n_tokens": facts["n_tokens"]}
        if self.settings.training != "none":
            facts = read_json(self._folder("recovery", _RECOVERY) / "result.json")
            costs = {
                "seconds": costs["seconds"] + facts["train_seconds"],
                "n_trained": facts["n_trained"],
                "n_tokens": costs["n_tokens"] + facts["n_tokens"],
            }
        return costs

    def _with(self, **settings: object) -> "Ladder":
        self._tokenised, self._evaluators  # so that both share them
        other = copy.copy(self)
        other.settings = replace(self.settings, **settings)
        return other
