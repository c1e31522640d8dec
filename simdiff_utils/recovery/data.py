"""Training data: instruction rows, chats or texts as the token rows that LoRA recovery trains on.

SimDiff, Table 6 (arXiv:2604.19520), takes Alpaca, prompt and answer both trained on. The form of other data
is told by its fields; chats, and Alpaca on request, go through the model's own chat template. A run's own
text is cut by `text`.
"""

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.files import repository_root

# The template Alpaca's rows were made for: the first where a row brings an input of its own, the second where
# not.
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
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Fields that make a form, in the order they are looked for: Alpaca's own rows on the hub have a `text` as
# well.
FORMS = {
    "Alpaca": {"instruction": str, "output": str},
    "chat": {"messages": list},
    "ShareGPT": {"conversations": list},
    "text": {"text": str},
}
FORMS_HINT = (
    "the texts instruction and output, with or without input (Alpaca); a list messages (chat) or "
    "conversations (ShareGPT); or a text in the field text"
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Some templates write today's date into each chat by calling strftime_now; rows must not change from day to
# day, so this macro goes before. The day is the one Llama 3's template takes where no clock is there. `+%}`
# trims no newline.
ONE_DAY = (
    "{% macro strftime_now(form) %}{{ form.replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July')"
    ".replace('%m', '07').replace('%Y', '2024').replace('%y', '24') }}{% endmacro +%}"
)
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
    texts, form = _render_rows(_read_rows(source), source, tokenizer, chat_template)
    random.Random(seed).shuffle(texts)
    is_chat = form in ("chat", "ShareGPT") or (form == "Alpaca" and chat_template)
    rows, n_cut = _encode(texts, tokenizer, max_length, add_special_tokens=not is_chat)
    if len(rows) < 2:
        raise SimDiffError(
            f"Of the {len(texts):,} rows of {source}, cut to {max_length} tokens, {len(rows)} have the "
            "2 tokens that a prediction takes; training and validation need at least 2 such rows."
        )
    notes = []
    if n_cut:
        notes.append(f"{n_cut:,} of {len(texts):,} rows were longer than {max_length} tokens and were cut.")
    if len(rows) < len(texts):
        notes.append(
            f"{len(texts) - len(rows):,} of {len(texts):,} rows had fewer than 2 tokens, which leaves nothing "
            "to predict, and were left out."
        )
    if chat_template and form == "text":
        notes.append(
            "The rows are plain texts without turns: the chat template asked for does not apply to them."
        )
    if tokenizer.pad_token_id is None:
        token = "EOS token" if tokenizer.eos_token_id is not None else "first token"
        notes.append(
            f"The tokenizer has no pad token: short rows are filled up with its {token} (id "
            f"{pad_token_id(tokenizer)}), which is masked, so that nothing is learned from it."
        )
    n_held_out = min(n_validation, max(1, len(rows) // 10))
    train, validation = rows[n_held_out:], rows[:n_held_out]
    template = "chat template of the model" if is_chat else "plain text" if form == "text" else form
    example = tokenizer.decode(train[0]["input_ids"], clean_up_tokenization_spaces=False)
    return TrainingRows(train, validation, template, example, tuple(notes), hash_rows(train, validation))


def block_rows(train: Tensor, validation: Tensor, tokenizer) -> TrainingRows:
    """Token blocks [n_blocks, length] of a text, see `text.token_blocks`, as rows to train and to evaluate
    on."""
    train, validation = ([{"input_ids": block} for block in blocks] for blocks in (train, validation))
    example = tokenizer.decode(train[0]["input_ids"], clean_up_tokenization_spaces=False) if train else ""
    return TrainingRows(train, validation, "plain text", example, (), hash_rows(train, validation))


def hash_rows(train: Iterable[dict], validation: Iterable[dict]) -> str:
    """SHA-256 of the token ids, be they lists or tensors, and of which part each row belongs to."""
    digest = hashlib.sha256()
    for part in (train, validation):
        for row in part:
            ids = row["input_ids"]
            digest.update(json.dumps(ids.tolist() if isinstance(ids, Tensor) else ids).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def pad_token_id(tokenizer) -> int:
    """The id short rows are filled up with: pad, else EOS, else 0. Padding is masked, so any id does."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def pad_rows(rows: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, filled up on the right; every real token is a label, padding
    never.

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


def _encode(texts: list[str], tokenizer, max_length: int, add_special_tokens: bool) -> tuple[list[dict], int]:
    """Rows of 2 to max_length tokens, and how many were longer; shorter ones are left out."""
    # Some tokenizers append EOS on their own; only that one is taken off, not one that a row's own text ends
    # with.
    appends_eos = add_special_tokens and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    end = -1 if appends_eos else None
    rows, n_cut = [], 0
    with tqdm(total=len(texts), desc="tokenise rows", unit=" rows", unit_scale=True, leave=False) as bar:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            # verbose=False: no warning that a row is longer than the model's context, since it is cut below
            encoded = tokenizer(
                batch,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            for ids in encoded:
                ids = ids[:end]
                n_cut += len(ids) > max_length
                if len(ids[:max_length]) >= 2:
                    rows.append({"input_ids": ids[:max_length]})
            bar.update(len(batch))
    return rows, n_cut


def _read_rows(source: str) -> Sequence:
    candidates = (Path(source).expanduser(), repository_root() / source)  # notebooks run in their own folder
    path = next((path for path in candidates if path.is_file()), None)
    if source.endswith(SUFFIXES):
        if path is None:
            raise SimDiffError(f"There is no file {source} to train on; check the path.")
        rows = _read_file(path, source)
    elif (
        path is None
        and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source)
        and not source.endswith((".txt", ".md"))
    ):
        rows = _load_hub(source)
    else:
        raise SimDiffError(
            f"{source} is no data set this can train on: give a hub data set as org/name or "
            f"org/name:config, or a file that ends in one of {', '.join(SUFFIXES)}; plain text is "
            'trained on as the run\'s own, with the parameter text and train_data = "text".'
        )
    if len(rows) < 2:
        raise SimDiffError(f"{source} holds {len(rows)} rows; training and validation need at least 2.")
    return rows


def _read_file(path: Path, source: str) -> list:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SimDiffError(f"{source} cannot be read as UTF-8 text ({one_line(error)}).") from error
    if not content.strip():
        raise SimDiffError(f"{source} is empty.")
    try:
        whole = json.loads(content)
    except ValueError as error:
        if content.lstrip().startswith("["):
            raise SimDiffError(f"{source} is no complete JSON list ({error}).") from error
        return [
            _parse_line(line, number, source)
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        ]  # split, not splitlines, which would also cut at a U+2028 inside a text
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict) and _find_form(whole):
        return [whole]  # JSON lines, of which there is one
    fields = f" with the fields {', '.join(whole)}" if isinstance(whole, dict) else ""
    raise SimDiffError(
        f"{source} holds one JSON {type(whole).__name__}{fields}, where a list of rows is needed: save "
        "the list alone, or one row a line."
    )


def _parse_line(line: str, number: int, source: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise SimDiffError(
            f"{source} is no JSON list and no JSON lines file: line {number} is not JSON ({error})."
        ) from error


def _load_hub(source: str) -> Sequence:
    from datasets import (
        load_dataset,  # imported late: it takes a second, and the embedded text does without it
    )

    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub client raises many kinds
        reason = one_line(error)[:200]
        advice = (
            "accept the licence on its page, then `hf auth login`"
            if "gated" in reason
            else ("offline, give the path of a local JSON or JSONL file instead")
        )
        raise SimDiffError(
            f"The data set {source} could not be loaded ({type(error).__name__}: {reason}): check the "
            f"name; {advice}."
        ) from error


def _find_form(row: object) -> str | None:
    return next(
        (
            form
            for form, fields in FORMS.items()
            if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in fields.items())
        ),
        None,
    )


def _render_rows(rows: Sequence, source: str, tokenizer, chat_template: bool) -> tuple[list[str], str]:
    """Each row as the one text that will be tokenised, and the form they all have."""
    texts, forms = [], []
    for number, row in enumerate(
        tqdm(rows, desc="read rows", unit=" rows", unit_scale=True, leave=False), start=1
    ):
        where = f"Row {number} of {source}"
        form = _find_form(row)
        if form is None:
            fields = (
                ", ".join(map(str, row)) if isinstance(row, dict) else f"none, being a {type(row).__name__}"
            )
            raise SimDiffError(
                f"{where} has no form that is known here: it needs {FORMS_HINT}; its fields are: {fields}."
            )
        forms.append(form)
        if form != forms[0]:
            raise SimDiffError(
                f"{where} has the form {form} where row 1 has the form {forms[0]}: all rows of a data "
                "set need one form; keep each in a file of its own."
            )
        if form == "text":
            text = row["text"]
        elif form == "Alpaca":
            text = _render_alpaca(row, where, tokenizer, chat_template)
        else:
            text = _render_chat(
                _read_messages(row["messages" if form == "chat" else "conversations"], where),
                where,
                tokenizer,
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can say "\ud83d" alone, and a tokenizer cannot read it
            raise SimDiffError(
                f"{where} holds half a character ({error}): mend that row or leave it out."
            ) from error
        texts.append(text)
    return texts, forms[0]


def _render_alpaca(row: dict, where: str, tokenizer, chat_template: bool) -> str:
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise SimDiffError(f"{where} has an input that is no text.")
    if chat_template:
        question = f"{row['instruction']}\n\n{given}" if given.strip() else row["instruction"]
        return _render_chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}],
            where,
            tokenizer,
        )
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=given, output=row["output"])


def _read_messages(turns: list, where: str) -> list[dict]:
    messages = []
    for i, turn in enumerate(turns, start=1):
        turn = turn if isinstance(turn, dict) else {}
        role, content = (
            turn.get(name, turn.get(other)) for name, other in (("role", "from"), ("content", "value"))
        )
        if str(role) not in ROLES or not isinstance(content, str):
            raise SimDiffError(
                f"{where} has a message {i} that cannot be read: it needs a role (or from), one of "
                f"{', '.join(ROLES)}, and a text content (or value); the role here is {role!r}."
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _render_chat(messages: list[dict], where: str, tokenizer) -> str:
    if not tokenizer.chat_template:
        raise SimDiffError(
            f"{where} is to go through the model's chat template, and its tokenizer has none: take an "
            "instruct model, or train on Alpaca rows or texts with chat_template off."
        )
    try:
        template = tokenizer.get_chat_template()
        template = ONE_DAY + template if "strftime_now" in template else template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # jinja2's many kinds, ValueError, and what a template runs into
        raise SimDiffError(
            f"{where} is refused by the model's chat template ({one_line(error)}): change that row or "
            "leave it out."
        ) from error
