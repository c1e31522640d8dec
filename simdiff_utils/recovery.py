"""Recovery: a pruned model healed by LoRA, with the published recipe or one small enough for two CPU cores.

SimDiff, Table 6 (arXiv:2604.19520) fine-tunes low-rank adapters on Alpaca; PEFT makes the adapters, the
transformers Trainer trains them. What is ours: the recipes, the data and the merged result.
"""

import gzip
import json
import random
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simdiff_utils.settings import SimDiffError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The template Alpaca's rows were made for: the first where a row brings an input of its own, the second where not.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


@dataclass(frozen=True)
class Recipe:
    """How the adapters are trained; lengths in tokens, batch sizes in sequences."""

    data: str  # "text": the train split of the run's own text; else a hub id or a file in Alpaca form
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


PRESETS = {
    # Micro-batches of 2 were faster on a CPU than 4 or 8; dropout's random masks alone cost a tenth of a CPU step.
    "demo": Recipe(data="text", learning_rate=1e-3, batch_size=8, micro_batch_size=2, dropout=0.0, max_steps=16),
    # SimDiff, Table 6. That table gives a learning rate of 0.003, the text beside it 3e-4: they disagree, and
    # 3e-4 is the usual value for LoRA on Alpaca with AdamW, so it is the one taken here.
    "published": Recipe(data="tatsu-lab/alpaca", learning_rate=3e-4, batch_size=32, micro_batch_size=4, dropout=0.05),
}


def recipe_for(preset: str, learning_rate: float = 0.0, max_steps: int = 0) -> Recipe:
    """The preset's recipe, with the values given in place of its own; 0 keeps the preset's."""
    if preset not in PRESETS:
        raise SimDiffError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    recipe = PRESETS[preset]
    return replace(recipe, learning_rate=learning_rate or recipe.learning_rate, max_steps=max_steps or recipe.max_steps)


def block_dataset(blocks: Tensor) -> list[dict]:
    """Token blocks [n_blocks, length] as rows the Trainer takes."""
    return [{"input_ids": block} for block in blocks]


def alpaca_dataset(source: str, tokenizer, max_length: int, seed: int,
                   n_validation: int = 2000) -> tuple[list[dict], list[dict]]:
    """Alpaca rows as token rows: prompt and answer in one text, both trained on, no EOS at the end.

    Args:
        source: a hub id, or a local .json or .jsonl file, plain or .gz, of rows with the texts instruction,
            input and output.
        max_length: tokens a row is cut to.
        n_validation: rows held out by a shuffle with `seed`; at most a tenth of all rows.

    Returns:
        (train, validation), lists of {"input_ids": list of int} of unequal lengths.

    Raises:
        SimDiffError: the source cannot be read, or a row is not in Alpaca form.
    """
    rows = _read_rows(source)
    texts = [_alpaca_text(row, number, source) for number, row in enumerate(rows, start=1)]
    if len(texts) < 2:
        raise SimDiffError(f"{source} holds {len(texts)} rows; training and validation need at least 2.")
    random.Random(seed).shuffle(texts)
    encoded = []
    for start in tqdm(range(0, len(texts), 1000), desc="tokenise rows"):
        encoded += tokenizer(texts[start:start + 1000], truncation=True, max_length=max_length)["input_ids"]
    # Some tokenizers append EOS on their own; the published recipe trains without it.
    eos = tokenizer.eos_token_id
    examples = [{"input_ids": ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids} for ids in encoded]
    n_held_out = min(n_validation, max(1, len(examples) // 10))
    return examples[n_held_out:], examples[:n_held_out]


def _read_rows(source: str) -> list:
    path = Path(source).expanduser()
    if path.is_file():
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                text = file.read()
            return json.loads(text) if text.lstrip().startswith("[") else [
                json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, OSError) as error:
            raise SimDiffError(f"{source} is no JSON list and no JSON lines file ({error}).") from error
    if path.suffix in (".json", ".jsonl", ".gz"):
        raise SimDiffError(f"There is no file {source} to train on; check the path.")
    from datasets import load_dataset  # imported late: it takes a second, and the embedded text does without it

    try:
        return list(load_dataset(source, split="train"))
    except Exception as error:  # the hub client raises many kinds
        raise SimDiffError(f"The data set {source} could not be loaded ({type(error).__name__}); offline, give the "
                           "path of a local JSON or JSONL file in Alpaca form instead.") from error


def _alpaca_text(row: object, number: int, source: str) -> str:
    for key in ("instruction", "input", "output"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise SimDiffError(f"Row {number} of {source} has no text {key!r}: each row needs the texts instruction, "
                               "input (may be empty) and output.")
    template = ALPACA_WITH_INPUT if row["input"].strip() else ALPACA_WITHOUT_INPUT
    return template.format(**{key: row[key] for key in ("instruction", "input", "output")})


def pad_rows(rows: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, filled up on the right; every real token is a label, padding never.

    Returns:
        input_ids, attention_mask and labels, int64 [batch, longest]; labels are -100 where padded, and at
        position 0, which nothing predicts (the Trainer's count of targets would take it in for some models).
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    fill = torch.nn.utils.rnn.pad_sequence
    mask = fill([torch.ones_like(row) for row in ids], batch_first=True)
    input_ids = fill(ids, batch_first=True, padding_value=pad_token_id)
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def lora_config(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """PEFT's settings; every linear layer of the decoder where the model has other names than the recipe's.

    Neither way touches the embedding or the head: they stay as they are, and no gradient is kept for them.
    """
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules) if present.issuperset(recipe.target_modules) else "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))  # GPT-2 stores W transposed


class _LossLog(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, and the losses kept; prints no lines."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.started = time.perf_counter()
        if self.training_bar is not None:
            self.training_bar.set_description("LoRA recovery")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append({"step": state.global_step, "loss": logs["loss"],
                              "seconds": time.perf_counter() - self.started})
            if self.training_bar is not None:
                self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def train_lora(model: PreTrainedModel, tokenizer, train_dataset: list[dict], eval_dataset: list[dict] | None,
               recipe: Recipe, output_dir: Path, dtype: torch.dtype,
               seed: int) -> tuple[PreTrainedModel, pd.DataFrame, int]:
    """Train LoRA adapters on the model, save them alone, and merge them into the model's own weights.

    With bfloat16 the multiplications run in bfloat16 (autocast) on the weights as they are: on two CPU cores as
    fast as a bfloat16 copy of the weights, and there is no second copy, so float32 weights are what is merged into.

    Args:
        model: changed in place: afterwards its weights are W + lora_alpha/rank * B A. Trained where it lies.
        train_dataset, eval_dataset: rows with "input_ids"; the second is measured before and after (None: never).
        output_dir: the adapter goes to its folder `adapter`, as safetensors.
        dtype: torch.float32 or torch.bfloat16.
        seed: of the adapters' start, the order of the rows, and dropout.

    Returns:
        The merged model; a row per step [step, loss, eval_loss, seconds] (mean loss per token in nats, seconds
        since the start, step 0 the untrained model's evaluation); the number of parameters trained.

    Raises:
        SimDiffError: no rows, a dtype that does not train, a batch that micro-batches do not divide, or memory
            that does not suffice.
    """
    if not train_dataset:
        raise SimDiffError("There is nothing to train on: the data holds no row, or no block of the length asked for.")
    if dtype not in (torch.float32, torch.bfloat16):
        raise SimDiffError(f"LoRA trains in float32 or bfloat16, got {dtype}: small gradients vanish in float16.")
    set_seed(seed)
    use_cache = model.config.use_cache  # the Trainer switches it off in the config, which is exported later
    with warnings.catch_warnings():  # PEFT asks for an attribute that transformers 5 has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = get_peft_model(model, lora_config(model, recipe))
    log = _LossLog()
    evaluations = {}
    try:
        trainer = _make_trainer(peft_model, tokenizer, train_dataset, eval_dataset, recipe, output_dir, dtype, seed,
                                log)
        if eval_dataset:
            evaluations[0] = trainer.evaluate()["eval_loss"]
        trainer.train()
        if eval_dataset:
            evaluations[trainer.state.global_step] = trainer.evaluate()["eval_loss"]
    except BaseException as error:  # an interrupted cell, too, must leave the model as it was
        peft_model.unload()
        if _is_out_of_memory(error):
            raise SimDiffError(
                f"Training ran out of memory with micro_batch_size {recipe.micro_batch_size} and max_length "
                f"{recipe.max_length}: lower micro_batch_size first (a step still sees {recipe.batch_size} "
                "sequences), then max_length.") from error
        raise
    finally:
        model.config.use_cache = use_cache
    n_trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    # "auto" would ask the hub whether the vocabulary was resized; the embedding is never trained here.
    peft_model.save_pretrained(output_dir / "adapter", save_embedding_layers=False)
    merged = peft_model.merge_and_unload(safe_merge=True).eval()
    history = pd.DataFrame([{"step": 0, "seconds": 0.0}, *log.rows] if eval_dataset else log.rows,
                           columns=["step", "loss", "eval_loss", "seconds"])
    history["eval_loss"] = history["step"].map(evaluations).astype(float)
    return merged, history, n_trained


def _make_trainer(peft_model, tokenizer, train_dataset, eval_dataset, recipe, output_dir, dtype, seed, log) -> Trainer:
    on_cpu = peft_model.device.type == "cpu"
    args = TrainingArguments(
        output_dir=str(output_dir), seed=seed, use_cpu=on_cpu, bf16=dtype == torch.bfloat16,
        learning_rate=recipe.learning_rate, optim="adamw_torch", lr_scheduler_type="linear",
        max_steps=recipe.max_steps or -1, num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch_size, per_device_eval_batch_size=recipe.micro_batch_size,
        logging_steps=1, save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        prediction_loss_only=True, label_names=["labels"], remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu)
    per_pass = args.train_batch_size * args.world_size  # several GPUs each take a micro-batch
    if recipe.batch_size % per_pass:
        raise SimDiffError(f"batch_size {recipe.batch_size} is no multiple of the {per_pass} sequences of one pass "
                           "(micro_batch_size on every device): change either.")
    args.gradient_accumulation_steps = recipe.batch_size // per_pass
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id does
    trainer = Trainer(model=peft_model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                      data_collator=lambda rows: pad_rows(rows, pad_token_id), callbacks=[log])
    trainer.remove_callback(PrinterCallback)  # which would print a dict per step; `log` shows the same on its bar
    return trainer


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own; the CPU allocator raises a RuntimeError known by its words only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "you tried to allocate" in str(error)
