"""All that the workbook claims about GPUs, in one script of at most eight minutes.

    python -m benchmarks.gpu benchmarks/results/gpu.csv [--parts speed compiled capture agreement placement]

For the day when a GPU is at hand: weights are random and made on the device (of speed they say the same as
trained ones), nothing is downloaded. Every part has a time limit of its own and stops between two
measurements when that is over; what is there by then is written after each part, with the machine. Where a
part fails, its error stands in the table, and the next goes on.

* speed, compiled: Table 4 of SimDiff, LLaMA3.1-8B without 0, 4, 6, 8, 10 and 12 layers (4 tokens in, 2,048
  out, batch 16; decode integrated over five lengths of the cache), eager, and with a static cache as a CUDA
  graph; beside it the bound, from the bandwidth and the matrix rate measured first;
* capture: all statistics against the bare forward pass of the same layers, at 1.5B and 8B;
* agreement: statistics on the CPU and on the GPU, the largest relative difference;
* placement: where `load_model` puts the layers of a checkpoint, and whether its losses are the CPU's.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.capture import SIDES, seconds
from benchmarks.speed import spread
from simdiff_utils import one_line
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers, load_model
from simdiff_utils.engine.perplexity import block_losses
from simdiff_utils.files import write_whole
from simdiff_utils.models.shapes import random_model, shape_folder
from simdiff_utils.provenance import describe_machine
from simdiff_utils.speed.bound import bound_phases, measure_rates
from simdiff_utils.speed.generate import PROTOCOLS, Protocol
from simdiff_utils.speed.tables import describe_speed
from simdiff_utils.speed.timing import measure_speed, without_layers

REMOVED, PROTOCOL = (4, 6, 8, 10, 12), replace(PROTOCOLS["paper"], n_timed_steps=8)
LIMITS = {"speed": 130, "compiled": 170, "capture": 60, "agreement": 30, "placement": 60}  # seconds
Load = Callable[[str, torch.dtype], PreTrainedModel]


def _speed(load: Load, removed: tuple[int, ...], protocol: Protocol, compiled: bool) -> Iterator[dict]:
    """One number of layers at a time, each against the dense model, in turns."""
    dense = load("llama3.1-8b", torch.bfloat16)
    rates, n_layers = measure_rates(dense.device, dense.dtype), len(decoder_layers(dense))
    yield {"name": "bandwidth", "value": rates.bandwidth / 1e9, "unit": "GB/s"}
    yield {"name": "matrix product", "value": rates.matrix_rate / 1e12, "unit": "TFLOP/s"}
    for n_remove in removed:
        lacking = spread(n_layers, n_remove)
        with ExitStack() as stack:
            pruned = stack.enter_context(without_layers(dense, lacking))
            samples = measure_speed(dense, {lacking: pruned}, protocol, 3, compiled)
            bounds = pd.concat(
                bound_phases(model, protocol, rates).assign(n_remove=n)
                for n, model in ((0, dense), (n_remove, pruned))
            )
        for row in describe_speed(samples, bounds).itertuples():
            yield {
                "name": f"{row.phase}, {row.n_remove} of {n_layers} layers removed, {row.way}",
                "value": row.tokens_per_s,
                "unit": "tokens/s",
                "speedup": row.speedup,
                "speedup_low": row.speedup_low,
                "speedup_high": row.speedup_high,
                "share_of_bound": row.share_of_bound,
            }


def _capture(load: Load) -> Iterator[dict]:
    for shape in ("qwen2.5-1.5b", "llama3.1-8b"):
        decoder = Decoder(load(shape, torch.bfloat16))
        n_words, draw = decoder.model.config.vocab_size, torch.Generator().manual_seed(0)
        blocks = torch.randint(0, n_words, (8, 512), generator=draw).to(decoder.model.device)
        for side in SIDES:  # first calls pick kernels
            seconds(SIDES[side], decoder, blocks[:2])
        ratios = []
        for _ in range(5):
            forward, captured = (
                seconds(SIDES[side], decoder, blocks) for side in ("plain forward", "capture")
            )
            ratios.append(captured / forward)
        yield {"name": f"capture over forward, {shape}", "value": float(np.median(ratios)), "unit": "ratio"}


def _agreement(load: Load) -> Iterator[dict]:
    for dtype in (torch.float32, torch.bfloat16):
        model = load("qwen2.5-0.5b", dtype)
        blocks = torch.randint(0, 97, (4, 128), generator=torch.Generator().manual_seed(0))
        there = capture_statistics(Decoder(model), blocks.to(model.device)).by_sample
        here = capture_statistics(Decoder(model.to("cpu")), blocks).by_sample
        largest = float((np.abs(there - here) / np.abs(here).max(axis=(1, 2), keepdims=True)).max())
        yield {"name": f"statistics, CPU against device, {dtype}", "value": largest, "unit": "relative"}


def _placement(folder: Callable[[], Path]) -> Iterator[dict]:
    model = load_model(folder(), "float32")
    devices = {str(p.device) for p in model.parameters()}
    blocks = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    there = block_losses(Decoder(model), blocks.to(model.device), (frozenset(), frozenset({1})))
    here = block_losses(Decoder(model.to("cpu")), blocks, (frozenset(), frozenset({1})))
    yield {
        "name": f"losses, placed on {', '.join(sorted(devices))}",
        "value": float(np.abs(there - here).max()),
    }


def measure(
    target: Path,
    names: list[str],
    load: Load = random_model,
    folder: Callable[[], Path] = lambda: shape_folder("qwen2.5-0.5b:4"),
    removed: tuple[int, ...] = REMOVED,
    protocol: Protocol = PROTOCOL,
) -> pd.DataFrame:
    """Run the parts named, each within its limit; the table is written after each."""
    parts = {
        "speed": lambda: _speed(load, removed, protocol, compiled=False),
        "compiled": lambda: _speed(load, removed, protocol, compiled=True),
        "capture": lambda: _capture(load),
        "agreement": lambda: _agreement(load),
        "placement": lambda: _placement(folder),
    }
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else describe_machine()
    about = {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__}
    rows = []
    for name in names:
        started = time.perf_counter()
        try:
            for row in parts[name]():
                rows.append({"part": name} | row | about)
                print(rows[-1], flush=True)
                if time.perf_counter() - started > LIMITS[name]:
                    rows.append({"part": name, "name": f"stopped after {LIMITS[name]} s"} | about)
                    break
        except Exception as error:  # one part less is better than none: it says why, and the next goes on
            rows.append({"part": name, "name": f"failed: {one_line(error)[:300]}"} | about)
            print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        target.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(target) as partial:
            pd.DataFrame(rows).to_csv(partial, index=False, float_format="%.6g")
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    given = parser.parse_args()
    measure(given.target, given.parts)
