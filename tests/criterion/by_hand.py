"""The papers' formulas by hand, in float64, on the tiny models' own forward: what criteria are held to.

Nothing of ours is in them: hooks on the layers, layers passed by, numpy, torch's own gradients. Token 0,
which the models' configs call padding, is a word like any other in the texts.
"""

import copy
import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.propose import propose
from tests.helpers import VOCAB_SIZE

N_LAYERS = 9  # Shortened-LLM's criteria protect six
NUMBERS = range(1, N_LAYERS)
NAMES = ["llama", "gpt2", "gemma3", "falcon", "mixtral"]
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MATRICES = {  # what Mag and Taylor sum over, by hand, beside the norms' weights
    "llama": [*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma3": [*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "falcon": [
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    "mixtral": [*LLAMA, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt-oss": [*LLAMA, "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


class Oracle:
    """A copy of a model in float64, and what its own forward says of its layers."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        if hasattr(self.model.config, "num_local_experts"):
            self.model.set_experts_implementation("eager")  # the fast one knows no float64
        stack = self.model.base_model
        self.layers = list(stack.layers if hasattr(stack, "layers") else stack.h)
        self.final_norm = stack.norm if hasattr(stack, "norm") else stack.ln_f
        self.returns_tuple = "Falcon" in type(model).__name__
        self._losses = {}

    @contextmanager
    def passed_by(self, removed):
        """Some layers answer with what they are given."""
        for i in removed:
            self.layers[i].forward = lambda hidden_states, *_, **__: (
                (hidden_states,) if self.returns_tuple else hidden_states
            )
        try:
            yield
        finally:
            for i in removed:
                del self.layers[i].forward

    @torch.inference_mode()
    def states(self, blocks):
        """What enters each layer, and the final norm; then what leaves the norm: [L + 2, samples, seq, d]."""
        seen = []
        handles = [
            place.register_forward_pre_hook(
                lambda _module, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0].clone()),
                with_kwargs=True,
            )
            for place in (*self.layers, self.final_norm)
        ]
        handles.append(
            self.final_norm.register_forward_hook(lambda _module, _args, out: seen.append(out.clone()))
        )
        self.model(input_ids=blocks, use_cache=False)
        for handle in handles:
            handle.remove()
        return torch.stack(seen).numpy()

    @torch.inference_mode()
    def loss(self, blocks, removed=()):
        """Mean loss in nats per token without some layers."""
        key = frozenset(removed)
        if key not in self._losses:
            with self.passed_by(key):
                logits = self.model(input_ids=blocks, use_cache=False).logits
            self._losses[key] = float(
                np.mean([block_loss(*pair).item() for pair in zip(logits, blocks, strict=True)])
            )
        return self._losses[key]

    def weights(self, name):
        """The weights of the linear maps and norms of each layer, and attention sinks, by their names."""
        return [[p for n, p in layer.named_parameters() if is_weight(n, name)] for layer in self.layers]


def is_weight(parameter, family):
    """Whether a parameter of a layer counts for Mag and Taylor."""
    linear = re.sub(r"\.weight$", "", parameter) in MATRICES[family]
    return linear or bool(re.search(r"(norm|ln_\d)\.weight$|layernorm\.weight$|\.sinks$", parameter))


def block_loss(logits, tokens):
    """Mean over the positions of -log p(next token), in nats."""
    return -logits[:-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].mean()


@dataclass(frozen=True)
class Small:
    """A tiny model with all that methods may look at, and its oracle."""

    name: str
    model: torch.nn.Module
    oracle: Oracle
    calibration: torch.Tensor
    validation: torch.Tensor
    evidence: Evidence

    def proposed(self, criterion, n_remove):
        return propose(criterion, self.evidence, n_remove)

    def chosen(self, criterion, n_remove):
        (candidate,) = self.proposed(criterion, n_remove)
        assert candidate.proposed_by == criterion and np.isnan(candidate.low) and np.isnan(candidate.high)
        return candidate.removed


def lowest(scores, n, without=()):
    return frozenset(
        [i for _, i in sorted((score, i) for i, score in enumerate(scores)) if i not in without][:n]
    )


def text(seed, n_blocks, seq_len=30):
    return torch.randint(0, VOCAB_SIZE, (n_blocks, seq_len), generator=torch.Generator().manual_seed(seed))


def blank_statistics(n_layers):
    return LayerStatistics(
        np.ones((4, n_layers, 2)),
        np.ones((4, n_layers, 2)),
        np.ones(n_layers),
        np.ones((n_layers + 1, n_layers + 1)),
    )


def refusal(call, *args, **kwargs):
    """The sentence that a call is refused with."""
    with pytest.raises(SimDiffError) as error:
        call(*args, **kwargs)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 250
    return sentence


def cosine(a, b):
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def removed_by(merges):
    return frozenset(i for _, folded in merges for i in folded)
