"""Calibration capture: one forward pass of the decoder stack, three numbers per layer and position."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from simdiff_utils.criteria import measure_tokens
from simdiff_utils.decoder import Decoder, stream_decoder
from simdiff_utils.models import load_model, text_config
from simdiff_utils.results import peak_memory_gib, run_fresh
from simdiff_utils.settings import SimDiffError

_CHUNK = 160_000  # numbers measured at once: what they take stays in the processor's cache
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


def capture_statistics(decoder: Decoder, blocks: Tensor, batch_size: int = 2) -> LayerStatistics:
    """Measure every layer on calibration text in one pass of the decoder stack (no head).

    Each layer's own input and output are seen, so the last layer is measured before the final norm. Only sums are
    kept: in memory, the peak does not grow with the number of samples.

    Args:
        decoder: the model, in memory or streamed.
        blocks: token ids [n_samples, seq_len], no padding.
        batch_size: samples per forward pass.

    Raises:
        SimDiffError: a hidden state is not finite (names layer and dtype).
    """
    sums = torch.zeros(decoder.n_layers, len(STATISTICS), blocks.shape[1], dtype=torch.float64)

    def observe(layer_idx: int, h_in: Tensor, h_out: Tensor) -> None:
        n_tokens = max(32, _CHUNK // h_in.shape[-1])
        chunks = zip(h_in.flatten(0, 1).split(n_tokens), h_out.flatten(0, 1).split(n_tokens), strict=True)
        per_token = torch.cat([measure_tokens(*chunk) for chunk in chunks], dim=1)  # [3, batch * seq]
        summed = per_token.view(len(STATISTICS), *h_in.shape[:2]).sum(1, dtype=torch.float64).cpu()
        if not torch.isfinite(summed).all():
            raise SimDiffError(f"layer {layer_idx} gives hidden states that are not finite in {h_out.dtype}; "
                               'run with dtype="float32", or "bfloat16" where float16 overflows.')
        sums[layer_idx] += summed

    for _ in decoder.run(blocks, batch_size, observe=observe, desc="capture"):
        pass
    return LayerStatistics((sums / len(blocks)).transpose(0, 1).contiguous().numpy(), len(blocks))


def measure_capture_memory(folder: Path, dtype: str, n_samples: list[int], seq_len: int) -> pd.DataFrame:
    """Peak resident memory of a capture over the number of samples, in memory and streamed.

    Each way runs in a fresh process of its own, the numbers of samples in rising order; the text is made of random
    tokens, since memory does not depend on it. Both run at once: only memory is asked for.

    Returns:
        one row per (way, n_samples): peak_gib (GiB, interpreter, libraries and file pages included), and states_gib,
        the hidden states that the streamed way keeps of all samples.
    """
    def measure(way: str) -> list[dict]:
        arguments = [str(folder.resolve()), "--dtype", dtype, "--way", way, "--seq-len", str(seq_len),
                     "--n-samples", *map(str, sorted(n_samples))]
        return run_fresh("simdiff_utils.capture", arguments, f"the {way} capture in a fresh process",
                         TQDM_DISABLE="1", OMP_NUM_THREADS="1")  # one core each: they would fight for two

    with ThreadPoolExecutor() as pool:
        return pd.DataFrame([row for rows in pool.map(measure, ("in memory", "streamed")) for row in rows])


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("--dtype", "--way"):
        parser.add_argument(name)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--n-samples", type=int, nargs="+")
    given = parser.parse_args()
    decoder = (stream_decoder(given.folder, given.dtype) if given.way == "streamed" else
               Decoder(load_model(given.folder, given.dtype)))
    config, itemsize = text_config(decoder.model), decoder.model.dtype.itemsize
    rows = []
    for n_samples in given.n_samples:
        capture_statistics(decoder, torch.randint(config.vocab_size, (n_samples, given.seq_len)))
        states = n_samples * given.seq_len * config.hidden_size * itemsize / 2**30 if decoder.streamed else 0.0
        rows.append({"way": given.way, "n_samples": n_samples, "peak_gib": peak_memory_gib(), "states_gib": states})
    print(json.dumps(rows))


if __name__ == "__main__":
    _main()
