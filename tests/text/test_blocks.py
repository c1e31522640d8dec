"""Token blocks: equal lengths, nothing lost, drawn evenly or by a seed."""

import logging
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from simdiff_utils import SimDiffError
from simdiff_utils.text.blocks import check_token_ids, draw_blocks, token_blocks

ALPHABET = string.ascii_lowercase + " \n"
IDS = {"<s>": 0, "</s>": 1, "?": 2} | {letter: 3 + i for i, letter in enumerate(ALPHABET)}


def make_tokenizer(template: str, max_length: int = 10**30) -> PreTrainedTokenizerFast:
    """One token per letter; `template` says which special tokens surround a text."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="?",
        model_max_length=max_length,
    )


TOKENIZERS = {template: make_tokenizer(template) for template in ("$A", "<s> $A", "<s> $A </s>", "$A </s>")}


# --- token blocks ---


@settings(deadline=None)  # a busy machine is no failure
@given(
    template=st.sampled_from(list(TOKENIZERS)),
    seq_len=st.integers(1, 12),
    documents=st.lists(st.text(ALPHABET, max_size=30), max_size=5),
)
def test_blocks_side_by_side_are_the_token_stream(template, seq_len, documents):
    stream = [IDS[letter] for letter in "\n\n".join(documents)]
    prefix = [0] if template.startswith("<s>") else []
    n_text = seq_len - len(prefix)
    if n_text < 1 or len(stream) < n_text:
        with pytest.raises(SimDiffError, match="seq_len"):
            token_blocks(TOKENIZERS[template], documents, seq_len)
        return
    blocks = token_blocks(TOKENIZERS[template], documents, seq_len)
    assert blocks.dtype == torch.int64 and blocks.shape[1] == seq_len
    assert blocks[:, : len(prefix)].tolist() == [prefix] * len(blocks)
    laid_out = blocks[:, len(prefix) :].flatten().tolist()
    assert laid_out == stream[: len(laid_out)]
    assert len(stream) - len(laid_out) < n_text  # only what fills no block is dropped


def test_too_short_text_says_how_many_tokens_there_are():
    with pytest.raises(SimDiffError, match="has 5 tokens, one block of seq_len 8 takes 7"):
        token_blocks(TOKENIZERS["<s> $A"], ["abcde"], 8)


def test_text_longer_than_the_models_context_warns_of_nothing(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        token_blocks(make_tokenizer("<s> $A", max_length=4), ["a" * 100], 4)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# --- drawn blocks ---


@settings(deadline=None)  # a busy machine is no failure
@given(n_blocks=st.integers(1, 60), data=st.data())
def test_drawn_blocks_are_different_ordered_and_repeatable(n_blocks, data):
    n = data.draw(st.integers(1, n_blocks))
    seed = data.draw(st.none() | st.integers(0, 2**31))
    blocks = torch.arange(n_blocks)[:, None].repeat(1, 3)
    drawn = draw_blocks(blocks, n, seed)
    positions = drawn[:, 0].tolist()
    assert drawn.shape == (n, 3) and positions == sorted(set(positions))
    assert torch.equal(drawn, draw_blocks(blocks, n, seed))
    if seed is None:
        gaps = [b - a for a, b in zip(positions, positions[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert (
            abs(positions[0] - (n_blocks - 1 - positions[-1])) <= 1
        )  # as far from the start as from the end


def test_seeds_draw_different_blocks():
    blocks = torch.arange(100)[:, None]
    assert not torch.equal(draw_blocks(blocks, 10, 0), draw_blocks(blocks, 10, 1))


def test_too_few_blocks_names_the_setting_to_lower():
    sentence = "has 3 blocks of 8 tokens, 4 were asked for: lower n_test or seq_len"
    with pytest.raises(SimDiffError, match=sentence):
        draw_blocks(torch.zeros(3, 8, dtype=torch.long), 4, parameter="n_test")


def test_a_token_without_embedding_is_a_sentence():
    check_token_ids(96, 97)
    with pytest.raises(SimDiffError, match="gives token id 97 and the model has 97 embeddings"):
        check_token_ids(97, 97)
