"""Rows of every form as texts to train on: in Alpaca's template, the model's chat template, or bare."""

from collections.abc import Iterable

from tqdm.auto import tqdm

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.text.rows import check_characters

# The template Alpaca's rows were made for; the part about an input is left out where a row brings none.
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
# Fields that make a form, in the order they are looked for: Alpaca's rows on the hub have a `text` as well.
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
# day, so this macro goes before. The day is the one Llama 3's template takes without a clock; `+%}` trims no
# newline.
ONE_DAY = (
    "{% macro strftime_now(form) %}{{ form.replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July')"
    ".replace('%m', '07').replace('%Y', '2024').replace('%y', '24') }}{% endmacro +%}"
)


class _BadRow(ValueError):
    """What is wrong with a row; `render_rows` says which one it is."""


def render_rows(rows: Iterable, source: str, tokenizer, chat_template: bool) -> tuple[list[str], str]:
    """Each row as the text that will be tokenised, and the form they all have (one of FORMS).

    Args:
        source: where they are from, for the error message.
        chat_template: put Alpaca rows through the tokenizer's chat template too.

    Raises:
        SimDiffError: a row has no known form, another than the first, or cannot be rendered.
    """
    texts, first = [], None
    bar = tqdm(rows, desc="read rows", unit=" rows", unit_scale=True, leave=False)
    for number, row in enumerate(bar, start=1):
        try:
            form = _find_form(row)
            first = first or form
            if form != first:
                raise _BadRow(
                    f"has the form {form} where row 1 has the form {first}: all rows of a data set need one "
                    "form; keep each in a file of its own"
                )
            text = row["text"] if form == "text" else _render(row, form, tokenizer, chat_template)
            check_characters(text, number, source)
        except _BadRow as error:
            raise SimDiffError(f"Row {number} of {source} {error}.") from error
        texts.append(text)
    return texts, first or "text"


def _find_form(row: object) -> str:
    given = row if isinstance(row, dict) else {}
    for form, fields in FORMS.items():
        if all(isinstance(given.get(name), kind) for name, kind in fields.items()):
            return form
    fields = ", ".join(map(str, given)) if isinstance(row, dict) else f"none, being a {type(row).__name__}"
    raise _BadRow(f"has no form that is known here: it needs {FORMS_HINT}; its fields are: {fields}")


def _render(row: dict, form: str, tokenizer, chat_template: bool) -> str:
    """Alpaca's rows in its template or as a chat of one question and its answer; chats as they are."""
    if form != "Alpaca":
        return _render_chat(_read_messages(row["messages" if form == "chat" else "conversations"]), tokenizer)
    question, given, answer = row["instruction"], row.get("input") or "", row["output"]
    if not isinstance(given, str):
        raise _BadRow("has an input that is no text")
    if not chat_template:
        template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
        return template.format(instruction=question, input=given, output=answer)
    question = f"{question}\n\n{given}" if given.strip() else question
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _render_chat(messages, tokenizer)


def _read_messages(turns: list) -> list[dict]:
    """Turns of role and content, or of ShareGPT's from and value, as transformers' templates take them."""
    messages = []
    for i, turn in enumerate(turns, start=1):
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if str(role) not in ROLES or not isinstance(content, str):
            raise _BadRow(
                f"has a message {i} that cannot be read: it needs a role (or from), one of "
                f"{', '.join(ROLES)}, and a text content (or value); the role here is {role!r}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _render_chat(messages: list[dict], tokenizer) -> str:
    if not tokenizer.chat_template:
        raise _BadRow(
            "is to go through the model's chat template, and its tokenizer has none: take an instruct model, "
            "or train on Alpaca rows or texts with chat_template off"
        )
    try:
        template = tokenizer.get_chat_template()
        template = ONE_DAY + template if "strftime_now" in template else template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # jinja2's many kinds, ValueError, and what a template runs into
        raise _BadRow(
            f"is refused by the model's chat template ({one_line(error)}): change that row or leave it out"
        ) from error
