"""The transformers Trainer as recovery uses it: a distillation loss, evaluations and whole checkpoints at an
even pace, a bar that stops where the loss is lost."""

import importlib.util
import math
import time
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.files import write_json
from simdiff_utils.recovery.distillation import distillation_loss, last_states
from simdiff_utils.recovery.recipe import Recipe
from simdiff_utils.recovery.training_rows import TrainingRows, pad_rows

COMPLETE = "complete.json"  # written last into a checkpoint: a kill while it is saved leaves none


class AdapterTrainer(Trainer):
    """The Trainer with the distillation loss, the time in its log, and checkpoints that hold the adapter
    alone."""

    def __init__(self, *args, teacher: Decoder | None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._teacher, self._student = teacher, teacher and Decoder(self.model.get_base_model())
        self._started, self._seconds_before = time.perf_counter(), None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = inputs["labels"][:, 1:]
        predicting = tokens != -100
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        states = last_states(model, self._student.model, inputs)[:, :-1][predicting]
        with torch.no_grad():
            wanted = last_states(self._teacher.model, self._teacher.model, inputs)[:, :-1][predicting]
        with self.accelerator.autocast():
            loss = distillation_loss(self._student, self._teacher, states, wanted, tokens[predicting])
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is None:
            return loss / len(states)
        return loss / num_items_in_batch * self.accelerator.num_processes  # which average their gradients

    def log(self, logs, start_time=None):
        if self._seconds_before is None:  # of the run that this one continues
            self._seconds_before = self.state.log_history[-1]["seconds"] if self.state.log_history else 0.0
        super().log(logs | {"seconds": self._seconds_before + time.perf_counter() - self._started})

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)


class _Pace(TrainerCallback):
    """Evaluates evenly spread over the training, and keeps a checkpoint after each evaluation but the
    last."""

    def __init__(self, n_evaluations: int, evaluates: bool) -> None:
        self._n, self._evaluates = n_evaluations, evaluates

    def on_step_end(self, args, state, control, **kwargs):
        before, here = ((state.global_step - i) * self._n // state.max_steps for i in (1, 0))
        due = here > before
        control.should_evaluate = due and self._evaluates
        control.should_save = due and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # every process saves its own random state
        if args.should_save:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, {})


class _Bar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it; prints no lines, and stops where the loss is
    lost."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("LoRA recovery")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise SimDiffError(
                f"The loss is not finite any more at step {state.global_step}: lower learning_rate "
                f"(now {args.learning_rate:g}), or set train_dtype to float32."
            )
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def make_trainer(
    model: PeftModel,
    rows: TrainingRows,
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    seed: int,
    pad_id: int,
    teacher: Decoder | None = None,
    resumed: bool = False,
) -> AdapterTrainer:
    """A Trainer of the model's adapters that does what the recipe says; see `lora.train_lora`.

    Args:
        pad_id: token that fills up the shorter rows of a batch; no loss falls on it.
        resumed: an earlier run has already evaluated the untrained adapters.
    """
    on_cpu = model.device.type == "cpu"
    checkpointing = dict(activation_checkpointing=recipe.gradient_checkpointing)
    if recipe.gradient_checkpointing:
        checkpointing |= dict(activation_checkpointing_kwargs={"use_reentrant": False})
    device = dict(use_cpu=on_cpu, bf16=dtype == torch.bfloat16, dataloader_pin_memory=not on_cpu)
    steps = dict(max_steps=recipe.max_steps or -1, num_train_epochs=recipe.epochs)
    optimiser = dict(optim="adamw_torch", lr_scheduler_type="linear", learning_rate=recipe.learning_rate)
    # `_Pace` and `_Bar` do these; the log keeps every step, a lost loss among them
    ours = dict(save_strategy="no", eval_strategy="no", disable_tqdm=True, report_to="none")
    log = dict(logging_steps=1, logging_nan_inf_filter=False, include_num_input_tokens_seen="non_padding")
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        save_total_limit=2,
        eval_on_start=bool(rows.validation) and not resumed,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **(device | steps | optimiser | checkpointing | ours | log),
    )
    per_pass = args.train_batch_size * args.world_size  # several GPUs each take a micro-batch
    if recipe.batch_size % per_pass:
        raise SimDiffError(
            f"batch_size {recipe.batch_size} is no multiple of the {per_pass} sequences of one pass "
            "(micro_batch_size on every device): change either."
        )
    args.gradient_accumulation_steps = recipe.batch_size // per_pass
    pace = _Pace(recipe.n_evaluations, bool(rows.validation))
    trainer = AdapterTrainer(
        teacher=teacher,
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.validation or None,
        data_collator=lambda batch: pad_rows(batch, pad_id),
        callbacks=[_Bar(), pace, *_curves(recipe.report_to, folder)],
    )
    trainer.remove_callback(PrinterCallback)  # which would print a dict per step; the bar shows the same
    return trainer


def _curves(report_to: str, folder: Path) -> list[TrainerCallback]:
    """TensorBoard's callback of the Trainer, writing beside the checkpoints."""
    if report_to == "none":
        return []
    if importlib.util.find_spec("tensorboard") is None:
        missing = 'report_to = "tensorboard" needs the package tensorboard: pip install tensorboard.'
        raise SimDiffError(missing)
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / "curves")))]
