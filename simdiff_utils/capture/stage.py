"""What notebook 01 keeps on disk: the statistics of a capture, and its peak memory."""

import pandas as pd

from simdiff_utils.capture.peak import measure_capture_memory
from simdiff_utils.capture.statistics import LayerStatistics, capture_statistics
from simdiff_utils.run import Run
from simdiff_utils.settings import CaptureSettings

ROOM = "simdiff_utils.capture"
GROUPS = (CaptureSettings,)


def statistics(run: Run) -> LayerStatistics:
    """What every layer does to the calibration samples; captured once for these settings."""

    def make(folder):
        captured = capture_statistics(run.decoder, run.blocks("train"), run.settings.batch_size)
        captured.save(folder)
        return {"n_tokens": captured.n_samples * run.settings.seq_len}

    return LayerStatistics.load(run.stage("capture", ROOM, GROUPS, make))


def peak_memory(run: Run) -> pd.DataFrame:
    """Peak memory of a capture over a few numbers of samples, in memory and streamed; see
    `measure_capture_memory`."""

    def make(folder):
        s = run.settings
        n_samples = sorted({max(1, s.n_samples // 16), max(1, s.n_samples // 4), s.n_samples})
        measured = measure_capture_memory(run.checkpoint.folder, s.dtype, n_samples, s.seq_len)
        measured.to_csv(folder / "memory.csv", index=False)
        return {}

    return pd.read_csv(run.stage("memory", ROOM, GROUPS, make) / "memory.csv")
