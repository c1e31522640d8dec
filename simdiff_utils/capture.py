"""Calibration capture: one forward pass of the decoder stack, three numbers per layer and position."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from simdiff_utils.criteria import measure_tokens
from simdiff_utils.models import decoder_layers, decoder_stack
from simdiff_utils.settings import SimDiffError

STATISTICS = ("cosine_distance", "mssd", "masd")


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the calibration samples, kept per position so that attention sinks stay visible.

    Attributes:
        by_position: float64 [3, n_layers, seq_len] in the order of `STATISTICS`.
        n_samples: blocks averaged.
    """

    by_position: np.ndarray
    n_samples: int

    def table(self) -> pd.DataFrame:
        """One row per layer (`layer_idx`, 0-based): each statistic over all positions (Eq. 2 to 4), and without
        position 0 (`..._without_first`)."""
        columns = {"layer_idx": np.arange(self.by_position.shape[1])}
        for name, values in zip(STATISTICS, self.by_position, strict=True):
            columns[name] = values.mean(axis=1)
        for name, values in zip(STATISTICS, self.by_position, strict=True):
            columns[f"{name}_without_first"] = values[:, 1:].mean(axis=1)
        return pd.DataFrame(columns)

    def save(self, folder: Path) -> None:
        """Write `statistics.safetensors` (per position) and `statistics.csv` (the table)."""
        save_file({"by_position": self.by_position, "n_samples": np.array(self.n_samples)},
                  folder / "statistics.safetensors")
        self.table().to_csv(folder / "statistics.csv", index=False)

    @classmethod
    def load(cls, folder: Path) -> "LayerStatistics":
        """Read what `save` wrote."""
        arrays = load_file(folder / "statistics.safetensors")
        return cls(arrays["by_position"], int(arrays["n_samples"]))


@torch.inference_mode()
def capture_statistics(model: torch.nn.Module, blocks: Tensor, batch_size: int = 2) -> LayerStatistics:
    """Measure every layer on calibration text in one pass of the decoder stack (no head).

    Hooks see each layer's own input and output, so the last layer is measured before the final norm. Only sums
    are kept: memory does not grow with the number of samples.

    Args:
        model: a decoder-only model of transformers, in eval mode.
        blocks: token ids [n_samples, seq_len], no padding.
        batch_size: samples per forward pass.

    Raises:
        SimDiffError: a hidden state is not finite (names layer and dtype).
    """
    layers = decoder_layers(model)
    sums = torch.zeros(len(STATISTICS), len(layers), blocks.shape[1], dtype=torch.float64)

    def make_hook(layer_idx: int):
        def hook(_layer, args: tuple, kwargs: dict, output) -> None:
            h_in = args[0] if args else kwargs["hidden_states"]
            h_out = output[0] if isinstance(output, tuple) else output
            per_token = measure_tokens(h_in, h_out)  # [3, batch, seq]
            sums[:, layer_idx] += per_token.sum(1, dtype=torch.float64).cpu()
        return hook

    handles = [layer.register_forward_hook(make_hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for batch in tqdm(blocks.split(batch_size), desc="capture", unit="batch"):
            decoder_stack(model)(input_ids=batch.to(model.device), use_cache=False)
            _refuse_non_finite(sums, model.dtype)
    finally:
        for handle in handles:
            handle.remove()
    return LayerStatistics((sums / len(blocks)).numpy(), len(blocks))


def _refuse_non_finite(sums: Tensor, dtype: torch.dtype) -> None:
    finite = torch.isfinite(sums).all(dim=-1).all(dim=0)
    if not finite.all():
        layer_idx = int((~finite).nonzero()[0])
        raise SimDiffError(f"layer {layer_idx} gives hidden states that are not finite in {dtype}; "
                           'run with dtype="float32", or "bfloat16" where float16 overflows.')
