"""A model without each of many sets of layers, as lm-eval sees models: asked once, it answers for all sets.

Everything around the forward pass is lm-eval's own (`HFLM`): tokenisation, special tokens, chat template,
truncation, generation. The forward pass is `Decoder.run`: layers below the first one in which two sets differ
are computed once.
"""

from collections import Counter

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.logits import logits_in_chunks, rows_in_cache
from simdiff_utils.engine.surgery import layers_removed

Removed = frozenset[int]
# Of each continuation its log-likelihood in nats, and whether greedy decoding gives it.
Answers = list[tuple[float, bool]]
# Both texts, the tokens of the context, those of the continuation.
Encoded = tuple[tuple[str, str], list[int], list[int]]


class SetsLM(HFLM):
    """lm-eval's language model over a `Decoder` and candidate sets of removed layers.

    Attributes:
        removed: the set that answers are given for; to be set by the caller between two evaluations.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        sets: tuple[Removed, ...],
        batch_tokens: int = 512,
    ) -> None:
        """Take a model; the tokenizer may get a padding token, so give a copy.

        Args:
            sets: 0-based layer indices to leave out.
            batch_tokens: tokens of a forward pass, padding included; a longer input is a batch of its own.

        Raises:
            SimDiffError: the tokenizer has neither BOS nor EOS.
        """
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise SimDiffError(
                "lm-eval begins every text with the tokenizer's BOS or EOS token, and it has neither: name "
                "eos_token in tokenizer_config.json, or measure no tasks (task_grid: [])."
            )
        batch_size = 1 if decoder.device.type == "cpu" else 8  # of generation only
        super().__init__(decoder.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._device = decoder.device
        self._decoder, self._sets, self._batch_tokens = decoder, sets, batch_tokens
        self._asked: list | None = None
        self._answers: dict[Removed, Answers] = {}
        self.removed = sets[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Answers:
        """Answers for the present set; the same requests are computed once, for all sets."""
        asked = [request.args for request in requests]
        if asked != self._asked:
            super().loglikelihood(requests, disable_tqdm=True)
            self._asked = asked
        return self._answers[self.removed]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Not here: perplexity of whole texts is `perplexity.block_losses`."""
        raise SimDiffError(
            f"{requests[0].task_name} asks for the perplexity of whole texts; take it from "
            "perplexity.block_losses and leave this task out."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Texts of the present set, by the model itself with its KV cache."""
        if self._decoder.streamed:
            raise SimDiffError(
                f"{requests[0].task_name} has the model write text, which it cannot while it is "
                "streamed from disk: raise memory_gib where there is room, or leave the task out."
            )
        if self.tokenizer.eos_token_id is None:
            raise SimDiffError(
                f"{requests[0].task_name} has the model write text until its tokenizer's EOS token, and it "
                "has none: name eos_token in tokenizer_config.json, or leave the task out."
            )
        n_new = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
        if n_new >= self.max_length:
            raise SimDiffError(
                f"{requests[0].task_name} has the model write up to {n_new} tokens, and its context is "
                f"{self.max_length}: leave the task out."
            )
        with layers_removed(self._decoder.model, self.removed):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Answers:
        inputs, groups = self._distinct_inputs(requests)
        batches, members = _pack(inputs, self._batch_tokens)
        n = len(requests)
        totals = {
            removed: (torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool))
            for removed in self._sets
        }
        done: Counter[Removed] = Counter()
        desc = f"{len(self._sets)} sets" if len(self._sets) > 1 else "requests"
        for removed, _batch, states in self._decoder.run(batches, 1, tuple(totals), desc=desc):
            here = members[done[removed]]
            done[removed] += 1
            targets = [
                (row, len(inputs[i]) - len(requests[n][2]) + k, token, n)
                for row, i in enumerate(here)
                for n in groups[i]
                for k, token in enumerate(requests[n][2])
            ]
            self._score(states, torch.tensor(targets), *totals[removed])
        for removed, (sums, _greedy) in totals.items():
            if sums.isnan().any():
                raise SimDiffError(
                    f"the model without layers {sorted(removed)} gives probabilities that are no "
                    f'numbers in {self._decoder.model.dtype}; run with dtype="float32".'
                )
        self._answers = {
            removed: list(zip(sums.tolist(), greedy.tolist(), strict=True))
            for removed, (sums, greedy) in totals.items()
        }
        return self._answers[self.removed]

    def _distinct_inputs(self, requests: list[Encoded]) -> tuple[list[list[int]], list[list[int]]]:
        """Every input once, cut on the left to the model's context, and the requests that it answers."""
        groups: dict[tuple[int, ...], list[int]] = {}
        longest = self.max_length
        for n, ((_, continuation), context_ids, continuation_ids) in enumerate(requests):
            if not 0 < len(continuation_ids) <= longest:
                raise SimDiffError(
                    f"the answer {continuation[:60]!r} has {len(continuation_ids)} tokens, and this "
                    f"model can be asked for 1 to {longest}: leave the task out."
                )
            whole = (context_ids + continuation_ids)[-(longest + 1) :]
            groups.setdefault(tuple(whole[:-1]), []).append(n)
        return [list(tokens) for tokens in groups], list(groups.values())

    @torch.inference_mode()  # else parts of a pass's states are ordinary tensors, whose logits keep a graph
    def _score(self, states: Tensor, targets: Tensor, sums: Tensor, greedy: Tensor) -> None:
        """Add to `sums`, and clear in `greedy`, what the targets (row, position, token, request) of a batch
        say.

        Logits are taken only at positions that predict a token of a continuation, each position once.
        """
        places, which = torch.unique(targets[:, :2], dim=0, return_inverse=True)
        order = which.argsort(stable=True)
        targets, which = targets[order], which[order]
        hidden = states[places[:, 0].to(states.device), places[:, 1].to(states.device)]  # [n_places, d]
        for logits, numbers in logits_in_chunks(self._decoder, hidden, torch.arange(len(places))):
            for rows, asked in rows_in_cache(logits, numbers):
                here = (which >= asked[0]) & (which <= asked[-1])
                tokens, owners = targets[here, 2].to(rows.device), targets[here, 3]
                scores = rows.float().log_softmax(-1)
                picked = (which[here] - asked[0]).to(rows.device)
                sums.index_add_(0, owners, scores[picked, tokens].double().cpu())
                missed = owners[(scores.argmax(-1)[picked] != tokens).cpu()]
                greedy[missed] = False


def _pack(inputs: list[list[int]], batch_tokens: int) -> tuple[list[Tensor], list[list[int]]]:
    """Batches [batch, seq] of inputs of like length, the longest first, and which inputs are their rows.

    Rows are filled up on the right with their last token: in a causal model nothing to its left changes.
    """
    members: list[list[int]] = []
    for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i])):
        if not members or (len(members[-1]) + 1) * len(inputs[members[-1][0]]) > batch_tokens:
            members.append([])
        members[-1].append(i)
    batches = []
    for rows in members:
        n_tokens = len(inputs[rows[0]])
        filled = [inputs[i] + inputs[i][-1:] * (n_tokens - len(inputs[i])) for i in rows]
        batches.append(torch.tensor(filled))
    return batches, members
