"""Cuts of Gemma-3-270M that keep its pattern of layers beside free ones, in transformers and in llama.cpp.

    python -m benchmarks.llama_cpp PROGRAMS benchmarks/results/llama_cpp.csv

PROGRAMS: the folder of llama-quantize and llama-perplexity (`make test-interop` compiles them). Sets are
chosen on validation text in transformers; perplexity is that of other text, in both tools by the protocol of
llama-perplexity.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from simdiff_utils import assets, provenance
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.stage import choices
from simdiff_utils.engine.load import load_tokenizer, read_config
from simdiff_utils.engine.surgery import layer_kinds, layers_removed
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

NAME, GRID = "gemma-3-270m", [2, 4, 6]
# SLEB keeps the last layer, which every cut of two layers that keeps the pattern removes
CRITERIA = {False: ["cosine", "portfolio", "sleb"], True: ["cosine", "portfolio"]}
N_CHUNKS, CHUNK = 4, 512


def cut_and_measure(programs: Path, gguf: Path, removed: frozenset[int], text: Path, n_chunks: int) -> float:
    """Perplexity by llama.cpp of a model cut by it, in float32: each chunk's second half is counted."""
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "cut.gguf"
        layers = ",".join(map(str, sorted(removed)))
        quantize = ["llama-quantize", "--allow-requantize", "--prune-layers", layers, gguf, cut, "F32"]
        measure = ["llama-perplexity", "-m", cut, "-f", text, "-c", CHUNK, "-b", CHUNK, "--chunks", n_chunks]
        for program, *arguments in (quantize, [*measure, "-ctk", "f32", "-ctv", "f32"]):
            command = [programs / program, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{program} failed: {done.stderr[-2000:]}")
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)[1])


@torch.inference_mode()
def measure(model, tokenizer, text: Path, n_chunks: int) -> float:
    """The same of a model in transformers."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    begins = ids[0] == tokenizer.bos_token_id
    losses = []
    for chunk in ids[: n_chunks * CHUNK].split(CHUNK):
        chunk = chunk.clone()
        if begins:
            chunk[0] = tokenizer.bos_token_id
        logits = model(input_ids=chunk[None], use_cache=False).logits[0, CHUNK // 2 : -1]
        losses.append(-logits.double().log_softmax(-1).gather(1, chunk[CHUNK // 2 + 1 :, None]))
    return torch.cat(losses).mean().exp().item()


def write_test_text(file: Path, run: Run, n_chunks: int) -> None:
    """Test articles, more than n_chunks of them."""
    articles = "\n\n".join(run.corpus.documents["test"])
    file.write_text(articles[: n_chunks * CHUNK * 8], encoding="utf-8")


def main(programs: Path, target: Path) -> None:
    run = Run(Settings(model=f"embedded:{NAME}", n_validation=16))
    dense, folder = run.model, run.checkpoint.folder
    cuts, tokenizer, rows = Cuts(layer_kinds(read_config(folder))), load_tokenizer(folder), []
    measured: dict[frozenset[int], dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        write_test_text(text, run, N_CHUNKS)
        for keep_pattern in (False, True):
            table = choices(run.replace(keep_pattern=keep_pattern), GRID, CRITERIA[keep_pattern])
            for row in tqdm(list(table.itertuples()), desc=f"keep_pattern={keep_pattern}", unit="cut"):
                removed = frozenset(row.removed)
                if removed not in measured:
                    with layers_removed(dense, removed):
                        in_transformers = measure(dense, tokenizer, text, N_CHUNKS)
                    in_llama_cpp = cut_and_measure(programs, assets.fetch(NAME), removed, text, N_CHUNKS)
                    measured[removed] = {"transformers": in_transformers, "llama_cpp": in_llama_cpp}
                rows.append(
                    {
                        "n_remove": row.n_remove,
                        "criterion": row.criterion,
                        "keep_pattern": keep_pattern,
                        "removed": " ".join(map(str, row.removed)),
                        "pattern_kept": cuts.allows(removed),
                        "validation_perplexity": row.validation_perplexity,
                    }
                    | measured[removed]
                )
                print(rows[-1], flush=True)
    text = (
        f"# python -m benchmarks.llama_cpp · embedded:{NAME}, float32; chosen on 16 x 256 validation tokens, "
        f"perplexity of {N_CHUNKS} x {CHUNK} test tokens (second halves), English Wikipedia\n"
        f"# {provenance.describe_machine()} · torch {torch.__version__}\n"
    )
    table = pd.DataFrame(rows).sort_values(["n_remove", "criterion", "keep_pattern"])
    target.write_text(text + table.to_csv(index=False, float_format="%.6g"), encoding="utf-8")
    print("wrote", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
