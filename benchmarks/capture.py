"""Capture against the plain forward of the same decoder stack, and against `output_hidden_states=True`.

    python -m benchmarks.capture benchmarks/results/capture.csv

Every side runs on the same batches in one process, a piece of eight samples each in turn, so that what else
the machine does hits all alike; a turn is all pieces, and ratios are taken within a turn. Memory is the peak
of what tensors hold at once beyond the weights, counted tensor by tensor (the operating system's figure is
too coarse for buffers of a megabyte); activations inside one operation are not seen, on no side.
"""

import gc
import itertools
import sys
import time
import weakref
from pathlib import Path

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simdiff_utils import provenance
from simdiff_utils.capture.equations import measure_tokens
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_stack, load_model
from simdiff_utils.models import checkpoints

MODELS = ["embedded:smollm2-135m-instruct", "shape:qwen2.5-1.5b:4"]
N_TURNS, N_SAMPLES, PIECE, SEQ_LEN, BATCH_SIZE = 5, 32, 8, 256, 2


class LiveBytes(TorchDispatchMode):
    """Bytes held at once by tensors made inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {tensor.untyped_storage().data_ptr() for tensor in taken}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, cdata: int, n_bytes: int) -> None:
        self.known.discard(cdata)
        self.now -= n_bytes


@torch.inference_mode()
def plain(decoder: Decoder, blocks: torch.Tensor) -> None:
    for batch in blocks.split(BATCH_SIZE):
        decoder_stack(decoder.model)(input_ids=batch, use_cache=False)


def capture(decoder: Decoder, blocks: torch.Tensor) -> None:
    capture_statistics(decoder, blocks, BATCH_SIZE)


@torch.inference_mode()
def usual(decoder: Decoder, blocks: torch.Tensor) -> None:
    """The usual way: all states of all layers (the last one after the final norm, which is wrong)."""
    for batch in blocks.split(BATCH_SIZE):
        stack = decoder_stack(decoder.model)
        states = stack(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states
        for before, after in itertools.pairwise(states):
            measure_tokens(before, after).sum(1)


SIDES = {"plain forward": plain, "capture": capture, "output_hidden_states": usual}


def seconds(side, decoder: Decoder, blocks: torch.Tensor) -> float:
    gc.collect()
    started = time.perf_counter()
    side(decoder, blocks)
    return time.perf_counter() - started


def _turn(decoder: Decoder, blocks: torch.Tensor) -> dict[str, float]:
    pieces = [{s: seconds(f, decoder, piece) for s, f in SIDES.items()} for piece in blocks.split(PIECE)]
    return {s: sum(piece[s] for piece in pieces) for s in SIDES}


def peak_bytes(side, decoder: Decoder, blocks: torch.Tensor) -> int:
    gc.collect()
    with LiveBytes() as live:
        side(decoder, blocks)
    return live.peak


def main(target: Path) -> None:
    rows = []
    for name, dtype in itertools.product(MODELS, ["float32", "bfloat16"]):
        checkpoint = checkpoints.resolve_checkpoint(name)
        decoder = Decoder(load_model(checkpoint.folder, dtype))
        vocabulary, draw = decoder.model.config.vocab_size, torch.Generator().manual_seed(0)
        blocks = torch.randint(0, vocabulary, (N_SAMPLES, SEQ_LEN), generator=draw)
        for side in SIDES.values():
            side(decoder, blocks[:BATCH_SIZE])  # first calls pick kernels
        turns = pd.DataFrame([_turn(decoder, blocks) for _ in range(N_TURNS)])
        buffer = BATCH_SIZE * SEQ_LEN * decoder.model.config.hidden_size * decoder.model.dtype.itemsize
        peaks = {s: peak_bytes(f, decoder, blocks[: 2 * BATCH_SIZE]) for s, f in SIDES.items()}
        for s in SIDES:
            ratio = turns[s] / turns["plain forward"]
            rows.append(
                {
                    "model": checkpoint.label,
                    "dtype": dtype,
                    "layers": decoder.n_layers,
                    "side": s,
                    "tokens": blocks.numel(),
                    "turns": N_TURNS,
                    "seconds_median": round(turns[s].median(), 2),
                    "ratio_median": round(ratio.median(), 3),
                    "ratio_min": round(ratio.min(), 3),
                    "ratio_max": round(ratio.max(), 3),
                    "extra_peak_buffers": round((peaks[s] - peaks["plain forward"]) / buffer, 2),
                }
            )
            print(rows[-1], flush=True)
    origin = provenance.provenance()
    machine = f"{origin['machine']} · torch {torch.__version__} · {origin['time']}"
    text = f"# python -m benchmarks.capture · {machine}\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + pd.DataFrame(rows).to_csv(index=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
