"""Training data: instruction rows, chats or texts as the token rows that LoRA recovery trains on.

SimDiff, Table 6 (arXiv:2604.19520), takes Alpaca, prompt and answer both trained on. The form of other data
is told by its fields, see `templates`. A run's own text is cut by `text`.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError
from simdiff_utils.recovery.templates import render_rows
from simdiff_utils.text.hub import load_hub, split_name
from simdiff_utils.text.rows import find_file, read_rows

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
OFFLINE_HINT = "offline, give the path of a local JSON or JSONL file instead"
BATCH = 100  # rows tokenised at once: as fast as more, and the tokenizer's own records of long texts stay few


@dataclass(frozen=True)
class TrainingRows:
    """Token rows in two parts.

    Attributes:
        train, validation: lists of {"input_ids": list of int}, of unequal lengths, in shuffled order.
        template: the form the model sees them in: "Alpaca", "chat template of the model" or "plain text".
        example: the first training row decoded, special tokens and all.
        notes: sentences a user should read: rows cut, rows left out, no pad token.
        sha256: hash of all token ids and of how they are split.
    """

    train: list[dict]
    validation: list[dict]
    template: str
    example: str
    notes: tuple[str, ...]
    sha256: str


def load_rows(
    source: str, tokenizer, max_length: int, seed: int, n_validation: int = 2000, chat_template: bool = False
) -> TrainingRows:
    """Read a data set, whatever its form, and tokenise it.

    Alpaca rows and texts start with what the tokenizer itself prepends and end without EOS, as in the
    published recipe; what the chat template writes is taken as it is.

    Args:
        source: a hub data set `org/name` or `org/name:config` (its split train), or a local .json or .jsonl
            file, plain or .gz. All rows have one form: Alpaca (instruction, output, and input, which may be
            missing or empty), chat (`messages` of role and content, or ShareGPT's `conversations` of from and
            value), or `text`.
        tokenizer: of transformers.
        max_length: tokens a row is cut to.
        n_validation: rows held out by a shuffle with `seed`; at most a tenth of all rows.
        chat_template: put Alpaca rows through the model's chat template too, as one question and its answer.

    Raises:
        SimDiffError: the source cannot be read, a row has no known form or another than the first, the chat
            template is missing or refuses a row, or fewer than 2 rows of 2 tokens are there.
    """
    texts, form = render_rows(_read_source(source), source, tokenizer, chat_template)
    random.Random(seed).shuffle(texts)
    is_chat = form in ("chat", "ShareGPT") or (form == "Alpaca" and chat_template)
    rows, n_cut = _encode(texts, tokenizer, max_length, add_special_tokens=not is_chat)
    if len(rows) < 2:
        raise SimDiffError(
            f"Of the {len(texts):,} rows of {source}, cut to {max_length} tokens, {len(rows)} have the "
            "2 tokens that a prediction takes; training and validation need at least 2 such rows."
        )
    filling = "EOS token" if tokenizer.eos_token_id is not None else "first token"
    notes = [  # each with whether it applies
        (n_cut, f"{n_cut:,} of {len(texts):,} rows were longer than {max_length} tokens and were cut."),
        (
            len(rows) < len(texts),
            f"{len(texts) - len(rows):,} of {len(texts):,} rows had fewer than 2 tokens, which leaves "
            "nothing to predict, and were left out.",
        ),
        (
            chat_template and form == "text",
            "The rows are plain texts without turns: the chat template asked for does not apply to them.",
        ),
        (
            tokenizer.pad_token_id is None,
            f"The tokenizer has no pad token: short rows are filled up with its {filling} (id "
            f"{pad_token_id(tokenizer)}), which is masked, so that nothing is learned from it.",
        ),
    ]
    n_held_out = min(n_validation, max(1, len(rows) // 10))
    return _in_parts(
        rows[n_held_out:],
        rows[:n_held_out],
        tokenizer,
        template="chat template of the model" if is_chat else "plain text" if form == "text" else form,
        notes=tuple(note for applies, note in notes if applies),
    )


def block_rows(train: Tensor, validation: Tensor, tokenizer) -> TrainingRows:
    """Token blocks [n_blocks, length] of a text, see `text.blocks`, as rows to train and to evaluate on."""
    train, validation = ([{"input_ids": block} for block in blocks] for blocks in (train, validation))
    return _in_parts(train, validation, tokenizer, template="plain text")


def hash_rows(train: Iterable[dict], validation: Iterable[dict]) -> str:
    """SHA-256 of the token ids, be they lists or tensors, and of which part each row belongs to."""
    digest = hashlib.sha256()
    for part in (train, validation):
        for row in part:
            ids = row["input_ids"]
            digest.update(json.dumps(ids.tolist() if isinstance(ids, Tensor) else ids).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def pad_token_id(tokenizer, n_embeddings: float = float("inf")) -> int:
    """The id short rows are filled up with: pad, else EOS, else 0. Padding is masked, so any id does that the
    model has an embedding for."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None and i < n_embeddings), 0)


def pad_rows(rows: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, filled up on the right; real tokens are labels, padding never is.

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


def _in_parts(train: list[dict], validation: list[dict], tokenizer, template: str, notes=()) -> TrainingRows:
    example = tokenizer.decode(train[0]["input_ids"], clean_up_tokenization_spaces=False) if train else ""
    return TrainingRows(train, validation, template, example, notes, hash_rows(train, validation))


def _read_source(source: str) -> Sequence:
    path, name = find_file(source), split_name(source)
    if path and source.endswith(SUFFIXES):
        return read_rows(path)
    if source.endswith(SUFFIXES):
        raise SimDiffError(f"There is no file {source} to train on; check the path.")
    if name and not path and not source.endswith((".txt", ".md")):
        return load_hub(*name, OFFLINE_HINT, split="train")
    raise SimDiffError(
        f"{source} is no data set this can train on: give a hub data set as org/name or org/name:config, or "
        f"a file that ends in one of {', '.join(SUFFIXES)}; plain text is trained on as the run's own, with "
        'the parameter text and train_data = "text".'
    )


def _encode(texts: list[str], tokenizer, max_length: int, add_special_tokens: bool) -> tuple[list[dict], int]:
    """Rows of 2 to max_length tokens, and how many were longer; shorter ones are left out."""
    # Only an EOS that the tokenizer appends on its own is taken off, not one that a row's text ends with.
    appends_eos = add_special_tokens and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    end = -1 if appends_eos else None
    # verbose=False: no warning that a row is longer than the model's context, since it is cut below
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False}
    options |= {"return_token_type_ids": False, "verbose": False}
    rows, n_cut = [], 0
    with tqdm(total=len(texts), desc="tokenise rows", unit=" rows", unit_scale=True, leave=False) as bar:
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start : start + BATCH], **options)["input_ids"]
            bar.update(len(batch))
            for ids in (encoded[:end] for encoded in batch):
                n_cut += len(ids) > max_length
                if len(ids[:max_length]) >= 2:
                    rows.append({"input_ids": ids[:max_length]})
    return rows, n_cut
