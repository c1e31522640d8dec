"""Calibration capture: one forward pass of the decoder stack, three numbers per layer and position."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from simdiff_utils import SimDiffError
from simdiff_utils.capture.equations import measure_tokens
from simdiff_utils.engine.decoder import Decoder

_CHUNK = 160_000  # numbers measured at once: what they take stays in the processor's cache
STATISTICS = ("cosine_distance", "mssd", "masd", "relative_update")
_MSSD = STATISTICS.index("mssd")
_TOP = 0.001  # share of the tokens in which outliers are looked for


@dataclass(frozen=True)
class LayerStatistics:
    """What every layer did to the calibration samples.

    Attributes:
        by_position: means over the samples, float64 [4, n_layers, seq_len] in the order of `STATISTICS`.
        by_sample: means over the positions, float64 [4, n_layers, n_samples].
        top_mssd: share of MSSD that the 0.1 % of tokens with the largest hold (at least one), float64
            [n_layers].
        angular_distance: mean over the samples of arccos(cos) / pi between the last token's states before
            layers i and j, float64 [n_layers + 1, n_layers + 1]; index n_layers is after the last layer,
            before the final norm.
    """

    by_position: np.ndarray
    by_sample: np.ndarray
    top_mssd: np.ndarray
    angular_distance: np.ndarray

    @property
    def n_samples(self) -> int:
        """Samples averaged."""
        return self.by_sample.shape[2]

    def table(self) -> pd.DataFrame:
        """One row per layer (`layer_idx`, 0-based): each statistic over all positions (Eq. 2 to 4, and ours),
        the same without position 0 (`..._without_first`), and the share of MSSD in the top 0.1 % of
        tokens."""
        columns = {"layer_idx": np.arange(self.by_position.shape[1])}
        for name, values in zip(STATISTICS, self.by_position, strict=True):
            columns[name] = values.mean(axis=1)
        for name, values in zip(STATISTICS, self.by_position, strict=True):
            columns[f"{name}_without_first"] = values[:, 1:].mean(axis=1)
        return pd.DataFrame(columns | {"top_mssd": self.top_mssd})

    def table_of(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Each statistic [n_layers] over some of the samples (indices, repeats allowed): what `normalise`
        reads."""
        return dict(zip(STATISTICS, self.by_sample[:, :, samples].mean(axis=2), strict=True))

    def save(self, folder: Path) -> None:
        """Write `statistics.safetensors` (everything) and `statistics.csv` (the table)."""
        save_file(vars(self), folder / "statistics.safetensors")
        self.table().to_csv(folder / "statistics.csv", index=False)

    @classmethod
    def load(cls, folder: Path) -> "LayerStatistics":
        """Read what `save` wrote."""
        return cls(**load_file(folder / "statistics.safetensors"))


def capture_statistics(decoder: Decoder, blocks: Tensor, batch_size: int = 2) -> LayerStatistics:
    """Measure every layer on calibration text in one pass of the decoder stack (no head).

    Each layer's own input and output are seen, so the last layer is measured before the final norm. Only sums
    are kept: in memory, the peak does not grow with the number of samples.

    Args:
        decoder: the model, in memory or streamed.
        blocks: token ids [n_samples, seq_len], no padding.
        batch_size: samples per forward pass.

    Raises:
        SimDiffError: a hidden state is not finite (names layer and dtype).
    """
    n_samples, seq_len = blocks.shape
    by_position = torch.zeros(len(STATISTICS), decoder.n_layers, seq_len, dtype=torch.float64)
    by_sample = torch.zeros(len(STATISTICS), decoder.n_layers, n_samples, dtype=torch.float64)
    largest = torch.zeros(decoder.n_layers, max(1, round(_TOP * blocks.numel())))
    n_seen = [0] * decoder.n_layers  # samples so far: batches come in order at every layer, streamed or not
    ends = _LastTokens(decoder.n_layers)

    def observe(layer_idx: int, h_in: Tensor, h_out: Tensor) -> None:
        n_tokens = max(32, _CHUNK // h_in.shape[-1])
        chunks = zip(h_in.flatten(0, 1).split(n_tokens), h_out.flatten(0, 1).split(n_tokens), strict=True)
        measured = torch.cat([measure_tokens(*chunk) for chunk in chunks], dim=1).cpu()
        per_token = measured.view(len(STATISTICS), *h_in.shape[:2])  # [4, batch, seq]
        summed = per_token.sum(1, dtype=torch.float64)
        if not torch.isfinite(summed).all():
            raise SimDiffError(
                f"layer {layer_idx} gives hidden states that are not finite in {h_out.dtype}; "
                'run with dtype="float32", or "bfloat16" where float16 overflows.'
            )
        start = n_seen[layer_idx]
        n_seen[layer_idx] += len(h_in)
        by_position[:, layer_idx] += summed
        by_sample[:, layer_idx, start : n_seen[layer_idx]] = per_token.mean(2, dtype=torch.float64)
        kept = largest.shape[1]
        largest[layer_idx] = torch.cat([largest[layer_idx], measured[_MSSD]]).topk(kept).values
        ends.add(layer_idx, start, h_in, h_out)

    for _ in decoder.run(blocks, batch_size, observe=observe, desc="capture"):
        pass
    mssd = by_position[_MSSD].sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    return LayerStatistics(
        *(
            array.contiguous().numpy()
            for array in (
                by_position / n_samples,
                by_sample,
                largest.double().sum(1) / mssd,
                ends.distance / n_samples,
            )
        )
    )


class _LastTokens:
    """Sum over the samples of the angular distance between the last token's states at any two depths.

    The states of a batch are dropped when its last layer has been seen; streamed, all batches are on their
    way at once, one token of each sample and depth: far less than the hidden states that streaming keeps.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers, self._states = n_layers, {}
        self.distance = torch.zeros(n_layers + 1, n_layers + 1, dtype=torch.float64)

    def add(self, layer_idx: int, batch: int, h_in: Tensor, h_out: Tensor) -> None:
        last = [h_in[:, -1].clone().cpu()] if layer_idx == 0 else []
        states = self._states.setdefault(batch, [])
        states += [*last, h_out[:, -1].clone().cpu()]  # a view would keep all tokens
        if layer_idx == self._n_layers - 1:
            along = torch.nn.functional.normalize(torch.stack(self._states.pop(batch), 1).double(), dim=-1)
            cosine = (along @ along.mT).clamp(-1, 1)  # [batch, depths, depths]
            self.distance += torch.arccos(cosine).sum(0).fill_diagonal_(0) / torch.pi
