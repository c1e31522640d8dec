"""Recovery by training: LoRA adapters on a pruned model, by the next token, or by it and by what the dense
model says.

SimDiff, Table 6 (arXiv:2604.19520) fine-tunes low-rank adapters on Alpaca; PEFT makes the adapters, the
transformers Trainer trains them. What is ours: the recipes (`recipe`), the distillation loss in chunks
(`distillation`), checkpoints from which a killed run goes on as if nothing had happened, and the merged
result.
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import PreTrainedModel, set_seed

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import text_config
from simdiff_utils.files import read_json, write_json
from simdiff_utils.recovery.recipe import Recipe, lora_config
from simdiff_utils.recovery.trainer import COMPLETE, make_trainer
from simdiff_utils.recovery.training_rows import TrainingRows, pad_token_id
from simdiff_utils.text.blocks import check_token_ids

_IDENTITY = "training.json"  # what a folder of checkpoints belongs to


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
    what = {"rows": rows.sha256, "weights": _fingerprint(model), "distillation": teacher is not None}
    how = {"recipe": asdict(recipe), "dtype": str(dtype), "seed": seed}
    checkpoint = _open_folder(folder, what | how)
    set_seed(seed)
    config = dict(vars(model.config))  # the Trainer switches the cache off in it, and it is exported later
    with warnings.catch_warnings():  # PEFT asks for an attribute that transformers 5 has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = get_peft_model(model, lora_config(model, recipe))
    try:
        pad_id = pad_token_id(tokenizer, model.get_input_embeddings().num_embeddings)
        resumed = checkpoint is not None
        trainer = make_trainer(peft_model, rows, recipe, folder, dtype, seed, pad_id, teacher, resumed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if resumed else None)
    except BaseException as error:  # an interrupted cell, too, must leave the model as it was
        peft_model.unload()
        if _is_out_of_memory(error):
            raise SimDiffError(
                f"Training ran out of memory with micro_batch_size {recipe.micro_batch_size} and max_length "
                f"{recipe.max_length}: lower micro_batch_size first (a step still sees {recipe.batch_size} "
                "sequences), then set gradient_checkpointing, then lower max_length."
            ) from error
        raise
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_disable()
    n_trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    state = PartialState()
    if state.is_main_process:
        # "auto" would ask the hub whether the vocabulary was resized; the embedding is never trained here.
        peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        (folder / _IDENTITY).unlink()
    state.wait_for_everyone()
    merged = peft_model.merge_and_unload(safe_merge=True).eval()
    return Trained(merged, _tabulate(trainer.state.log_history), n_trained)


def _refuse_unsuitable(
    model: PreTrainedModel, rows: TrainingRows, recipe: Recipe, dtype: torch.dtype
) -> None:
    if not rows.train:
        nothing = "There is nothing to train on: the data holds no row, or no block of the length asked for."
        raise SimDiffError(nothing)
    if dtype not in (torch.float32, torch.bfloat16):
        raise SimDiffError(
            f"LoRA trains in float32 or bfloat16, got {dtype}: small gradients vanish in float16."
        )
    highest = max(int(max(row["input_ids"])) for row in (*rows.train, *rows.validation))
    check_token_ids(highest, model.get_input_embeddings().num_embeddings)
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
    whole = [path for path in checkpoints if (path / COMPLETE).exists()]
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
    columns = ["step", "tokens", "loss", "eval_loss", "learning_rate", "seconds"]
    entries = pd.DataFrame([entry for entry in history if "loss" in entry or "eval_loss" in entry])
    table = entries.rename(columns={"num_input_tokens_seen": "tokens"}).reindex(columns=columns)
    # an evaluation is an entry of its own, at the step just logged
    merge = dict.fromkeys(columns[1:-1], "first") | {"seconds": "last"}
    return table.groupby("step", as_index=False).agg(merge)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own; the CPU allocator raises a RuntimeError known by its words only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "you tried to allocate" in str(error)
