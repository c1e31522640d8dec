"""The pruned model as a draft of the dense one: speculative decoding (arXiv:2211.17192), plain transformers.

The draft writes a few tokens, the dense model reads them all in one pass and keeps those that it would have
written itself. Greedily the text is the dense model's, whatever the draft: nothing is lost but time.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from simdiff_utils.speed.generate import now

N_DRAFTED = 5  # tokens that the draft writes at once


class _Calls:
    """Counts the passes of a model, and the tokens that it reads in them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.lengths: list[int] = []

    def __enter__(self) -> "_Calls":
        def count(_module: nn.Module, _positional: tuple, given: dict) -> None:
            self.lengths.append(given["input_ids"].shape[1])

        self._hook = self._model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of its own calls of `generate` for a draft."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def measure_draft(
    dense: PreTrainedModel,
    drafts: dict[str, PreTrainedModel],
    prompts: Tensor,
    n_new_tokens: int,
    n_drafted: int = N_DRAFTED,
) -> pd.DataFrame:
    """Generate from each prompt with the dense model alone and with each draft, in turns.

    Args:
        drafts: name -> model with the dense one's vocabulary.
        prompts: token ids [n_prompts, length]; one is generated from at a time.
        n_new_tokens: always so many: no early end.
        n_drafted: tokens that a draft writes before the dense model reads them.

    Returns:
        one row per (prompt, draft; "" is the dense model alone): prompt, draft, seconds, tokens_per_s,
        same_text (as the dense model's; where two words are as likely to the last digit, rounding may part
        them), drafted and accepted (tokens), acceptance (their ratio).
    """
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=n_new_tokens,
        use_cache=True,
        pad_token_id=len(dense.get_input_embeddings().weight),  # no token: one in the text would be masked
        num_assistant_tokens=n_drafted,
        num_assistant_tokens_schedule="constant",  # always as many, however sure the draft is
        assistant_confidence_threshold=0.0,
    )
    drafts = {name: copy.copy(draft) for name, draft in drafts.items()}  # on the same weights
    for draft in drafts.values():
        draft.generation_config = greedy
    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc="drafts", unit="prompt")):
        given = {"input_ids": prompt[None].to(dense.device)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        for name, draft in {"": None, **drafts}.items():
            started = now(dense.device)
            with _quiet(), _Calls(dense) as calls:
                text = dense.generate(**given, generation_config=greedy, assistant_model=draft)[0]
            seconds = now(dense.device) - started
            if draft is None:
                alone = text
            # each pass reads the drafted tokens behind one that is settled, and settles one of its own
            drafted = sum(length - 1 for length in calls.lengths[1:]) if draft else 0
            drafted += calls.lengths[0] - len(prompt) if draft else 0
            accepted = n_new_tokens - len(calls.lengths) if draft else 0
            rows.append(
                {
                    "prompt": number,
                    "draft": name,
                    "seconds": seconds,
                    "tokens_per_s": n_new_tokens / seconds,
                    "same_text": bool(torch.equal(text, alone)),
                    "drafted": drafted,
                    "accepted": accepted,
                    "acceptance": accepted / drafted if drafted else float("nan"),
                }
            )
    return pd.DataFrame(rows)
