"""Recovery by training: LoRA adapters on a pruned model, by the next token, or by it and by what the dense
model says.

SimDiff, Table 6 (arXiv:2604.19520) fine-tunes low-rank adapters on Alpaca; PEFT makes the adapters, the
transformers Trainer trains them. What is ours: the recipes, the distillation loss in chunks, checkpoints from
which a killed run goes on as if nothing had happened, and the merged result.
"""

import hashlib
import importlib.util
import json
import math
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers, text_config
from simdiff_utils.files import read_json, write_json
from simdiff_utils.recovery.data import TrainingRows, pad_rows, pad_token_id
from simdiff_utils.recovery.distillation import distillation_loss, last_states

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_COMPLETE = "complete.json"  # written last into a checkpoint: a kill while it is saved leaves none
_IDENTITY = "training.json"  # what a folder of checkpoints belongs to


@dataclass(frozen=True)
class Recipe:
    """How the adapters are trained; lengths in tokens, batch sizes in sequences."""

    data: str  # "text": the train split of the run's own text; else a hub id or a local file, see `training_data`
    learning_rate: float
    batch_size: int  # a step sees this many sequences ...
    micro_batch_size: int  # ... this many at a time, which is what memory has to hold
    dropout: float
    max_steps: int = 0  # 0: whole epochs
    epochs: float = 1.0
    max_length: int = 256
    rank: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = PROJECTIONS
    n_validation: int = 2000
    n_evaluations: int = 10  # during training, evenly spread; after each but the last a checkpoint is kept
    gradient_checkpointing: bool = False
    report_to: str = "none"


PRESETS = {
    # Micro-batches of 2 were faster on a CPU than 4 or 8; dropout's random masks alone cost a tenth of a CPU
    # step.
    "demo": Recipe(
        data="text", learning_rate=1e-3, batch_size=4, micro_batch_size=2, dropout=0.0, max_steps=8
    ),
    # SimDiff, Table 6. That table gives a learning rate of 0.003, the text beside it 3e-4: they disagree, and
    # 3e-4 is the usual value for LoRA on Alpaca with AdamW, so it is the one taken here.
    "published": Recipe(
        data="tatsu-lab/alpaca", learning_rate=3e-4, batch_size=32, micro_batch_size=4, dropout=0.05
    ),
}


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        model: the pruned model with the adapters merged into its weights.
        log: one row per step and evaluation (step 0: before training): step, tokens (seen so far, padding
            aside), loss (mean over the step's tokens, in nats: next-token, or `distillation_loss`), eval_loss
            (next-token, whatever was trained), learning_rate, seconds (since the start, pauses between runs
            aside).
        n_trained: parameters trained.
    """

    model: PreTrainedModel
    log: pd.DataFrame
    n_trained: int


def recipe_for(preset: str, **given) -> Recipe:
    """The preset's recipe with the values given in place of its own; 0 and empty ones keep the preset's.

    A short training is evaluated less often than `n_evaluations`: not before every fourth step.
    """
    if preset not in PRESETS:
        raise SimDiffError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    recipe = replace(PRESETS[preset], **{name: value for name, value in given.items() if value})
    most = max(recipe.max_steps // 4, 1) if recipe.max_steps else recipe.n_evaluations
    return replace(recipe, n_evaluations=min(recipe.n_evaluations, most))


def lora_config(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """PEFT's settings; every linear layer of the decoder where the model has other names than the published
    ones.

    Neither way touches the embedding or the head: they stay as they are, and no gradient is kept for them.

    Raises:
        SimDiffError: the recipe names modules of its own choice that the decoder layers do not have.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in decoder_layers(model).named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    unknown = sorted(set(recipe.target_modules) - linear)
    if unknown and recipe.target_modules != PROJECTIONS:
        raise SimDiffError(
            f"target_modules names {', '.join(unknown)}, and the layers of {type(model).__name__} have "
            f"{', '.join(sorted(linear))}; leave it empty for all of them."
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear" if unknown else list(recipe.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # GPT-2 stores W transposed


def train_lora(
    model: PreTrainedModel,
    tokenizer,
    rows: TrainingRows,
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    seed: int,
    teacher: Decoder | None = None,
) -> Trained:
    """Train LoRA adapters on the model, save them alone, and merge them into the model's own weights.

    With bfloat16 the multiplications run in bfloat16 (autocast) on the weights as they are, so float32
    weights are what is merged into. A run that was killed goes on from its last checkpoint in `folder` with
    the same rows, the same dropout and the same losses. Under `accelerate launch` every process trains on its
    share of each batch.

    Args:
        model: changed in place: afterwards its weights are W + lora_alpha/rank * B A. Trained where it lies.
        rows: what to train on, and what to evaluate on (an empty list: never).
        folder: checkpoints lie here while training, and afterwards only the folder `adapter` (safetensors)
            and, where asked for, TensorBoard's curves in `curves`.
        dtype: torch.float32 or torch.bfloat16.
        seed: of the adapters' start, the order of the rows, and dropout.
        teacher: the dense model: its next-token distribution is half of what the adapters learn, see
            `distillation_loss`.

    Raises:
        SimDiffError: no rows, rows beyond the model's context, a dtype that does not train, a batch that
            micro-batches do not divide, checkpoints of another training in `folder`, a loss that is not
            finite, or memory that does not suffice.
    """
    _refuse_unsuitable(model, rows, recipe, dtype)
    trained = _open_folder(
        folder,
        {
            "rows": rows.sha256,
            "recipe": asdict(recipe),
            "dtype": str(dtype),
            "seed": seed,
            "weights": _fingerprint(model),
            "distillation": teacher is not None,
        },
    )
    set_seed(seed)
    use_cache = model.config.use_cache  # the Trainer switches it off in the config, which is exported later
    with warnings.catch_warnings():  # PEFT asks for an attribute that transformers 5 has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = get_peft_model(model, lora_config(model, recipe))
    try:
        trainer = _make_trainer(
            peft_model, tokenizer, rows, recipe, folder, dtype, seed, teacher, resumed=bool(trained)
        )
        trainer.train(resume_from_checkpoint=str(trained) if trained else None)
    except BaseException as error:  # an interrupted cell, too, must leave the model as it was
        peft_model.unload()
        if _is_out_of_memory(error):
            raise SimDiffError(
                f"Training ran out of memory with micro_batch_size {recipe.micro_batch_size} and max_length "
                f"{recipe.max_length}: lower micro_batch_size first (a step still sees {recipe.batch_size} sequences), "
                "then set gradient_checkpointing, then lower max_length."
            ) from error
        raise
    finally:
        model.config.use_cache = use_cache
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_disable()
    n_trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    state = PartialState()
    if state.is_main_process:
        # "auto" would ask the hub whether the vocabulary was resized; the embedding is never trained here.
        peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (folder / _IDENTITY).unlink()
    state.wait_for_everyone()
    return Trained(
        peft_model.merge_and_unload(safe_merge=True).eval(), _tabulate(trainer.state.log_history), n_trained
    )


class _Trainer(Trainer):
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
        due = (
            state.global_step * self._n // state.max_steps
            > (state.global_step - 1) * self._n // state.max_steps
        )
        control.should_evaluate = due and self._evaluates
        control.should_save = due and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # every process saves its own random state
        if args.should_save:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE, {})


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


def _make_trainer(peft_model, tokenizer, rows, recipe, folder, dtype, seed, teacher, resumed) -> _Trainer:
    on_cpu = peft_model.device.type == "cpu"
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=on_cpu,
        bf16=dtype == torch.bfloat16,
        learning_rate=recipe.learning_rate,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        max_steps=recipe.max_steps or -1,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        eval_strategy="no",
        eval_on_start=bool(rows.validation) and not resumed,
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
    )
    per_pass = args.train_batch_size * args.world_size  # several GPUs each take a micro-batch
    if recipe.batch_size % per_pass:
        raise SimDiffError(
            f"batch_size {recipe.batch_size} is no multiple of the {per_pass} sequences of one pass "
            "(micro_batch_size on every device): change either."
        )
    args.gradient_accumulation_steps = recipe.batch_size // per_pass
    pad = pad_token_id(tokenizer)
    trainer = _Trainer(
        teacher=teacher,
        model=peft_model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.validation or None,
        data_collator=lambda batch: pad_rows(batch, pad),
        callbacks=[
            _Bar(),
            _Pace(recipe.n_evaluations, bool(rows.validation)),
            *_curves(recipe.report_to, folder),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # which would print a dict per step; the bar shows the same
    return trainer


def _curves(report_to: str, folder: Path) -> list[TrainerCallback]:
    """TensorBoard's callback of the Trainer, writing beside the checkpoints."""
    if report_to == "none":
        return []
    if importlib.util.find_spec("tensorboard") is None:
        raise SimDiffError(
            'report_to = "tensorboard" needs the package tensorboard: pip install tensorboard.'
        )
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / "curves")))]


def _refuse_unsuitable(
    model: PreTrainedModel, rows: TrainingRows, recipe: Recipe, dtype: torch.dtype
) -> None:
    if not rows.train:
        raise SimDiffError(
            "There is nothing to train on: the data holds no row, or no block of the length asked for."
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise SimDiffError(
            f"LoRA trains in float32 or bfloat16, got {dtype}: small gradients vanish in float16."
        )
    context = getattr(text_config(model), "max_position_embeddings", None)
    longest = max(len(row["input_ids"]) for row in (*rows.train, *rows.validation))
    if context and longest > context:
        raise SimDiffError(
            f"The longest row has {longest} tokens, and the model was built for {context}: lower "
            f"max_length (now {recipe.max_length})."
        )


def _open_folder(folder: Path, identity: dict) -> Path | None:
    """The last whole checkpoint in the folder, None where training begins; a foreign folder is refused.

    Pickles in a folder are read by the Trainer alone, with `weights_only=True`, and only from one that this
    very training began.
    """
    identity = {"training": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    known = folder / _IDENTITY
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if checkpoints and not (known.exists() and read_json(known) == identity):
        raise SimDiffError(
            f"{folder.name} holds checkpoints of another training (other rows, settings or weights): "
            "delete it, or name another folder."
        )
    state = PartialState()
    state.wait_for_everyone()  # before the main process writes what the others have just read
    whole = [path for path in checkpoints if (path / _COMPLETE).exists()]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, identity)
        for path in set(checkpoints) - set(whole):  # cut off while it was saved
            shutil.rmtree(path)
    state.wait_for_everyone()
    return whole[-1] if whole else None


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash of a sum per parameter: another pruned set or another repair gives another one."""
    sums = {name: parameter.detach().double().sum().item() for name, parameter in model.named_parameters()}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _tabulate(history: list[dict]) -> pd.DataFrame:
    """The Trainer's log as a table, a row per step; see `Trained`."""
    names = {"num_input_tokens_seen": "tokens"}
    columns = ["step", "tokens", "loss", "eval_loss", "learning_rate", "seconds"]
    entries = pd.DataFrame([entry for entry in history if "loss" in entry or "eval_loss" in entry])
    table = entries.rename(columns=names).reindex(columns=columns)
    # an evaluation is an entry of its own, at the step just logged
    return table.groupby("step", as_index=False).agg(
        dict.fromkeys(columns[1:-1], "first") | {"seconds": "last"}
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own; the CPU allocator raises a RuntimeError known by its words only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "you tried to allocate" in str(error)
