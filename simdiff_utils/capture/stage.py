"""What notebook 01 keeps on disk: the statistics of a capture."""

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
