"""Repair without training: what stays of a pruned model is adjusted at each cut, from one pass of calibration
text.

Cuts are healed front to back, on the states of the model healed so far, with the dense model's as targets;
`linear` and `magnitude` say how.
"""

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder, Through
from simdiff_utils.engine.load import text_config
from simdiff_utils.engine.surgery import keep
from simdiff_utils.recovery.linear import LinearRepair
from simdiff_utils.recovery.magnitude import MagnitudeRepair
from simdiff_utils.recovery.targets import dense_states

REPAIRS = ("magnitude", "linear")
_NUMBERS = ("strength", "error_before", "error_after")
COLUMNS = ("first", "last", "layer_idx", "target", *_NUMBERS, "note")


@torch.inference_mode()
def repair(
    dense: Decoder,
    pruned: PreTrainedModel,
    removed: frozenset[int],
    blocks: Tensor,
    batch_size: int,
    form: str,
) -> pd.DataFrame:
    """Adjust weights of a pruned model at every cut; names, shapes, dtypes, config, embedding and head stay.

    Args:
        dense: the model that was pruned, in memory or streamed; it is only run.
        pruned: the same without those layers, in memory; changed in place.
        removed: 0-based, in the dense model.
        blocks: calibration token ids [n_blocks, seq_len], no padding; the last quarter chooses the ridge's
            strength.
        batch_size: blocks per forward pass.
        form: one of `REPAIRS`.

    Returns:
        one row per cut (a run of neighbouring removed layers): first and last (its ends), layer_idx (the
        layer adjusted, for magnitude the first of them; NA for none), all in the dense model's numbering;
        target (what in it); strength (of the ridge, or s); error_before and error_after (squared distance to
        the dense state over that state's squared norm, mean over the calibration tokens; magnitude matches
        norms and may raise it); note (why a cut is left as it is, else "").

    Raises:
        SimDiffError: an unknown form, nothing removed, another model, too little text, or states that are not
            finite.
    """
    kept = keep(removed, dense.n_layers)
    _refuse_unsuitable(dense, pruned, removed, blocks, form)
    cuts = find_cuts(removed)
    ends = {kept.index(first - 1): last for first, last in cuts if first}  # by the layer before, as it is now
    nothing_before = {"note": "Left as it is: no layer stands before the cut."}
    made = {last: nothing_before for first, last in cuts if not first}
    if ends:
        targets = dense_states(dense, set(ends.values()), blocks, batch_size)
        decoder = Decoder(pruned)
        if form == "magnitude":
            healer = MagnitudeRepair(decoder, min(ends) + 1, blocks[:1])
        else:
            healer = LinearRepair(decoder, n_fit=len(blocks) - max(1, len(blocks) // 4))

        def revise(layer_idx: int, layer: nn.Module, through: Through) -> None:
            if layer_idx in ends:
                made[ends[layer_idx]] = healer.heal(layer_idx, layer, through, targets.pop(ends[layer_idx]))

        behind = frozenset(range(max(ends) + 1, decoder.n_layers))  # nothing is learnt there
        for _ in decoder.run(blocks, batch_size, (behind,), desc=f"{form} repair", revise=revise):
            pass
    rows = [{"first": first, "last": last, "target": "", "note": ""} | made[last] for first, last in cuts]
    table = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(_NUMBERS, float))
    places = [kept[row["layer_idx"]] if "layer_idx" in row else pd.NA for row in rows]
    return table.assign(layer_idx=pd.array(places, dtype="Int64"))


def find_cuts(removed: frozenset[int]) -> list[tuple[int, int]]:
    """First and last layer of every run of neighbouring removed layers, in order."""
    firsts = sorted(i for i in removed if i - 1 not in removed)
    lasts = sorted(i for i in removed if i + 1 not in removed)
    return list(zip(firsts, lasts, strict=True))


def _refuse_unsuitable(
    dense: Decoder, pruned: PreTrainedModel, removed: frozenset[int], blocks: Tensor, form: str
) -> None:
    if form not in REPAIRS:
        raise SimDiffError(f"a repair is one of {', '.join(REPAIRS)}; got {form!r}.")
    if not removed:
        raise SimDiffError("there is nothing to repair: no layer was removed.")
    mine, theirs = text_config(pruned), text_config(dense.model)
    n_kept = dense.n_layers - len(removed)
    if (mine.num_hidden_layers, mine.hidden_size) != (n_kept, theirs.hidden_size):
        raise SimDiffError(
            f"this is not the dense model without layers {sorted(removed)}: it has "
            f"{mine.num_hidden_layers} layers of width {mine.hidden_size}, where {n_kept} of width "
            f"{theirs.hidden_size} should be left."
        )
    if blocks.dim() != 2 or len(blocks) < 2:
        raise SimDiffError(
            "a repair needs two blocks of calibration text or more: it is fitted on some and chosen on "
            "others."
        )
