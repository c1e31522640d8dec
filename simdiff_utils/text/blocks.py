"""Token blocks of a text: equal lengths, no padding, every position counted."""

from collections.abc import Iterable

import torch
from torch import LongTensor
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError, require


def token_blocks(tokenizer, documents: Iterable[str], seq_len: int) -> LongTensor:
    """Cut a text into blocks of equal length, every position of which is counted.

    The documents, joined by blank lines, are tokenised once without special tokens; each block starts with
    what the tokenizer itself prepends to a text (BOS for Llama and Gemma, nothing for SmolLM2). The rest that
    fills no block is dropped; padding never occurs.

    Args:
        tokenizer: of transformers.
        seq_len: tokens in a block, those prepended included.

    Returns:
        int64 [n_blocks, seq_len].

    Raises:
        SimDiffError: the text does not fill one block, or seq_len leaves no room beside the prepended tokens.
    """
    prefix = _find_prefix(tokenizer)
    n_text = seq_len - len(prefix)
    if n_text < 1:
        raise SimDiffError(
            f"seq_len must be above the {len(prefix)} token(s) this tokenizer prepends, got {seq_len}."
        )
    joined = "\n\n".join(documents)  # tokenised in one call, so that no document boundary changes a token
    # a bar for long texts only; disable=False would overrule the user's TQDM_DISABLE
    look = {"desc": "tokenise", "unit": " characters", "unit_scale": True, "leave": False}
    with tqdm(total=len(joined), **look, **({"disable": True} if len(joined) < 500_000 else {})) as bar:
        # verbose=False: no warning that the whole is longer than the model's context, since blocks are not
        encoded = tokenizer(joined, add_special_tokens=False, return_attention_mask=False, verbose=False)
        bar.update(len(joined))
    ids = encoded["input_ids"]
    n_blocks = len(ids) // n_text
    if n_blocks == 0:
        raise SimDiffError(
            f"the text has {len(ids)} tokens, one block of seq_len {seq_len} takes {n_text}: give a longer "
            "text or lower seq_len."
        )
    body = torch.tensor(ids[: n_blocks * n_text]).view(n_blocks, n_text)
    head = torch.tensor(prefix, dtype=torch.long).expand(n_blocks, -1)
    return torch.cat([head, body], dim=1)  # [n_blocks, seq_len]


def check_token_ids(highest: int, n_embeddings: int | None) -> None:
    """Refuse a token id that the model has no embedding for."""
    require(
        n_embeddings is None or highest < n_embeddings,
        f"the tokenizer gives token id {highest} and the model has {n_embeddings} embeddings: tokens were "
        "added to the tokenizer alone; use the tokenizer that the model was trained with.",
    )


def draw_blocks(
    blocks: LongTensor, n: int, seed: int | None = None, parameter: str = "n_samples"
) -> LongTensor:
    """Choose n different blocks, in the order of the text: evenly spaced, or at random when a seed is given.

    Args:
        blocks: [n_blocks, seq_len].
        parameter: name of the setting that asked for n, for the error message.

    Raises:
        SimDiffError: there are fewer than n.
    """
    n_blocks, seq_len = blocks.shape
    if n > n_blocks:
        raise SimDiffError(
            f"this split of the text has {n_blocks} blocks of {seq_len} tokens, {n} were asked for: "
            f"lower {parameter} or seq_len, or give a longer text."
        )
    if seed is None:
        chosen = torch.tensor([(2 * i + 1) * n_blocks // (2 * n) for i in range(n)], dtype=torch.long)
    else:
        chosen = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return blocks[chosen]


def _find_prefix(tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before a text; those it may put after it are not wanted."""
    plain = tokenizer("text", add_special_tokens=False, verbose=False)["input_ids"]
    special = tokenizer("text", add_special_tokens=True, verbose=False)["input_ids"]
    starts = (i for i in range(len(special)) if special[i : i + len(plain)] == plain)
    return special[: next(starts, 0)]
