"""Peak memory of a capture over the number of samples, each way in a fresh process of its own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.engine.fresh import run_fresh
from simdiff_utils.engine.load import load_model, text_config
from simdiff_utils.models.own_code import trust_as_parent
from simdiff_utils.provenance import peak_memory_gib


def measure_capture_memory(folder: Path, dtype: str, n_samples: list[int], seq_len: int) -> pd.DataFrame:
    """Peak resident memory of a capture over the number of samples, in memory and streamed.

    Each way runs in a fresh process of its own, the numbers of samples in rising order; the text is made of
    random tokens, since memory does not depend on it. Both run at once: only memory is asked for.

    Returns:
        one row per (way, n_samples): peak_gib (GiB, interpreter, libraries and file pages included), and
        states_gib, the hidden states that the streamed way keeps of all samples.
    """
    sizes = {
        "folder": str(folder.resolve()),
        "dtype": dtype,
        "n_samples": sorted(n_samples),
        "seq_len": seq_len,
    }
    alone = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # one core each: they would fight for two

    def measure(way: str) -> list[dict]:
        what = f"the {way} capture in a fresh process"
        return run_fresh("simdiff_utils.capture.peak:probe", what, alone, streamed=way == "streamed", **sizes)

    ways = ("in memory", "streamed")
    with ThreadPoolExecutor() as pool:
        measured = zip(ways, pool.map(measure, ways), strict=True)
        return pd.DataFrame([{"way": way} | row for way, rows in measured for row in rows])


def probe(folder: str, dtype: str, n_samples: list[int], seq_len: int, streamed: bool) -> list[dict]:
    """Capture so many samples, one number after another; what this process has taken at most by then."""
    trust_as_parent()
    path = Path(folder)
    decoder = stream_decoder(path, dtype) if streamed else Decoder(load_model(path, dtype))
    config = text_config(decoder.model)
    state_gib = config.hidden_size * decoder.model.dtype.itemsize / 2**30 if streamed else 0.0  # of one token
    rows = []
    for n in n_samples:
        capture_statistics(decoder, torch.randint(config.vocab_size, (n, seq_len)))
        rows.append({"n_samples": n, "peak_gib": peak_memory_gib(), "states_gib": n * seq_len * state_gib})
    return rows
