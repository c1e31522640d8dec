"""A model larger than the memory it is given: streamed capture, evaluation of ten sets, and export.

    python -m benchmarks.streaming benchmarks/results/streaming.csv [shape:llama2-13b]

Each step runs in a process of its own, whose peak resident memory (file pages included) is read at its end,
and starts with none of the weights in the system's file cache. Beside the steps: reading all weights once,
and the arithmetic alone, the time of one layer in memory multiplied by how often a layer is run. Random
weights: only time and memory mean anything. Disk: the shape itself and, for a while, its pruned copy.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from simdiff_utils import provenance
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.engine.decoder import Decoder, open_decoder
from simdiff_utils.engine.headers import weight_files
from simdiff_utils.engine.perplexity import block_losses
from simdiff_utils.engine.weights import StreamedWeights
from simdiff_utils.models import checkpoints
from simdiff_utils.pruning.export import export_pruned

BUDGET_GIB, N_SAMPLES, SEQ_LEN, WINDOW, N_SETS = 6.0, 8, 128, 8, 10


def blocks() -> torch.Tensor:
    return torch.randint(0, 32000, (N_SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def candidate_sets(n_layers: int) -> tuple[frozenset[int], ...]:
    """Ten neighbouring windows in the later half, as a search over contiguous cuts would try."""
    first = n_layers - WINDOW - N_SETS - 1
    return tuple(frozenset(range(first + i, first + i + WINDOW)) for i in range(N_SETS))


def open_streamed(folder: Path) -> Decoder:
    return open_decoder(folder, "bfloat16", BUDGET_GIB, N_SAMPLES * SEQ_LEN)


def read(folder: Path) -> dict:
    for file in weight_files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(_BUFFER):
                pass
    return {}


def arithmetic(folder: Path) -> dict:
    """Seconds of one layer on all tokens and of the head; how many layer runs each step takes."""
    weights = StreamedWeights(folder, torch.bfloat16)
    decoder = Decoder(weights.model, weights)
    times = []
    with torch.inference_mode(), decoder.layer(decoder.n_layers // 2) as layer:
        hidden, calls = decoder.embed(blocks())
        args, kwargs = calls[decoder.n_layers // 2]
        for _ in range(6):
            started = time.perf_counter()
            layer(hidden, *args, **kwargs)
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        for block in hidden:
            decoder.logits(block[None])
        head = time.perf_counter() - started
    sets = candidate_sets(decoder.n_layers)
    runs = sum(
        len({frozenset(i for i in removed if i < layer) for removed in sets if layer not in removed})
        for layer in range(decoder.n_layers)
    )
    return {
        "capture": median(times[1:]) * decoder.n_layers,
        "ten sets": median(times[1:]) * runs + head * len(sets),
        "layer_runs": runs,
    }


def capture(folder: Path) -> dict:
    decoder = open_streamed(folder)
    assert decoder.streamed
    capture_statistics(decoder, blocks(), N_SAMPLES)
    return {}


def ten_sets(folder: Path) -> dict:
    decoder = open_streamed(folder)
    losses = block_losses(decoder, blocks(), candidate_sets(decoder.n_layers), N_SAMPLES)
    assert losses.shape == (N_SETS, N_SAMPLES)
    return {}


def export(folder: Path) -> dict:
    target = folder.parent / "benchmark-export"
    facts = dict.fromkeys(("hub_id", "alpha")) | dict.fromkeys(("criterion", "calibration", "text"), "none")
    facts |= {"model": folder.name, "source": folder.name, "measured": {}}
    facts["machine"] = provenance.describe_machine()
    try:
        export_pruned(folder, candidate_sets(40)[0], target, facts)
        return {"gb_written": sum(file.stat().st_size for file in target.iterdir()) / 1e9}
    finally:
        shutil.rmtree(target, ignore_errors=True)


def accelerate_offload(folder: Path) -> dict:
    """The same capture on a model of which accelerate keeps 3 GiB in memory; the rest it reads for every
    batch."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as offload:
        limits = dict(device_map="auto", max_memory={"cpu": "3GiB"}, offload_folder=offload)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **limits)
        capture_statistics(Decoder(model.eval()), blocks(), N_SAMPLES)
    return {}


_BUFFER = bytearray(1 << 24)
STEPS = {
    "read all weights": read,
    "arithmetic": arithmetic,
    "capture": capture,
    "ten sets": ten_sets,
    "export": export,
    "capture, accelerate disk offload": accelerate_offload,
}


def run_step(step: str, model: str) -> None:
    """In the child: one step, timed; its result as the last line."""
    folder = checkpoints.checkpoint_folder(model)
    for file in weight_files(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    facts = STEPS[step](folder)
    facts |= {"seconds": time.perf_counter() - started, "peak_gib": provenance.peak_memory_gib()}
    print(json.dumps(facts))


def main(target: Path, model: str) -> None:
    folder = checkpoints.checkpoint_folder(model)
    found = {}
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.streaming", "--step", step, model]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(f"the step {step!r} failed")
        found[step] = json.loads(done.stdout.splitlines()[-1])
        print(step, found[step], flush=True)
    reading = found["read all weights"]["seconds"]
    rows = []
    for step, facts in found.items():
        bound = reading + found["arithmetic"][step] if step in found["arithmetic"] else None
        seconds = found["arithmetic"]["capture"] if step == "arithmetic" else facts["seconds"]
        rows.append(
            {
                "step": step if step != "arithmetic" else "arithmetic of the capture",
                "seconds": round(seconds, 1),
                "bound_seconds": bound and round(bound, 1),
                "ratio_to_bound": bound and round(seconds / bound, 2),
                "peak_gib": round(facts["peak_gib"], 2),
            }
        )
    origin = provenance.provenance()
    size = sum(file.stat().st_size for file in weight_files(folder)) / 1e9
    text = (
        f"# python -m benchmarks.streaming · {model}, bfloat16, {size:.1f} GB, random weights · "
        f"{N_SAMPLES} x {SEQ_LEN} tokens, budget {BUDGET_GIB} GiB\n"
        f"# {origin['machine']} · torch {torch.__version__} · {origin['time']}\n"
        "# bound: reading all weights once plus the arithmetic, both measured in this run\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + pd.DataFrame(rows).to_csv(index=False), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--step":
        run_step(*sys.argv[2:])
    else:
        main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "shape:llama2-13b")
