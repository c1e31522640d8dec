"""What a grid's notebook runs need of a machine, from their settings and each model's size, before anything
starts.

No weight is read and neither torch nor transformers is loaded. Time is a limit to ask a batch system for,
well above what a run takes; how fast it is, only a measurement says (notebook 05).
"""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil
from huggingface_hub import HfApi, get_local_safetensors_metadata, hf_hub_download, snapshot_download

from simdiff_utils import assets
from simdiff_utils.files import check_disk, read_json
from simdiff_utils.models.names import hub_sentences, read_model_name
from simdiff_utils import SimDiffError, one_line
from simdiff_utils.settings import Settings
from workflow.plan import NotebookRun

_GIB = 2**30
_PROCESS_GIB = 4.0  # Python, libraries, Snakemake and papermill, activations and logits of small batches
_COPIES = {
    "01": 1,
    "02": 1,
    "03": 2,
    "04": 2,
    "05": 2,
    "06": 1,
}  # models held at once: dense and pruned, teacher and pupil
_WHOLE = {"04", "05"}  # notebooks that never stream a model from disk
_SETS = 12  # sets of layers that a choice evaluates, roughly
_PER_SECOND = {"cpu": 2e10, "gpu": 3e13}  # operations, at a fraction of what any of today's reaches
_MOST_MINUTES = 2880  # two days: what batch systems grant; a run that was cut off goes on where it was
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """What is known of a checkpoint without its weights.

    Attributes:
        n_parameters: of the whole model.
        n_layers: decoder layers.
        n_outside: parameters outside the decoder layers (embedding, head, norms).
        n_bytes: of its weight files, as stored.
        here: whether those are on this machine.
    """

    n_parameters: int
    n_layers: int
    n_outside: int
    n_bytes: int
    here: bool


@dataclass(frozen=True)
class Needs:
    """What one notebook run asks for.

    Attributes:
        memory_gib: with every model it holds whole in memory.
        least_gib: with models streamed from disk where the notebook can.
        n_gpus: 0 where none are asked for.
        minutes: limit of its time.
        disk_bytes: what it writes, at most.
    """

    memory_gib: float
    least_gib: float
    n_gpus: int
    minutes: int
    disk_bytes: int


@functools.cache  # the check and every job ask for the same models
def look_up(model: str) -> ModelSize:
    """Size of the model that a user's name means (see `checkpoints.resolve_checkpoint`).

    Raises:
        SimDiffError: there is no such model, or it cannot be reached.
    """
    match read_model_name(model):
        case "shape", name:
            from simdiff_utils.models.shapes import shape_size

            n_parameters, n_layers, n_outside = shape_size(name)
            return ModelSize(n_parameters, n_layers, n_outside, 2 * n_parameters, False)
        case "embedded", name:
            folder, gguf, n_bytes = assets.locate_model(name)
            if folder.exists():
                return _size_of_folder(folder, model)
            return (
                _size_of_gguf(gguf) if gguf.exists() else ModelSize(2 * n_bytes, 1, n_bytes, n_bytes, False)
            )
        case "folder", name:
            return _size_of_folder(Path(name), model)
        case "gguf", name:
            return _size_of_gguf(Path(name))
    return _size_on_hub(model)


def _size_on_hub(hub_id: str) -> ModelSize:
    with hub_sentences(hub_id):
        try:
            cached = snapshot_download(hub_id, local_files_only=True)
        except FileNotFoundError:
            cached = None
        if cached and any(Path(cached).glob("*.safetensors")):
            return _size_of_folder(Path(cached), hub_id)
        api = HfApi()
        api.model_info(
            hub_id, timeout=10
        )  # asked first, since it fails at once where the other two try for half a minute
        config = read_json(Path(hf_hub_download(hub_id, "config.json")))
        return _size(api.get_safetensors_metadata(hub_id), config, here=False)


def _size_of_folder(folder: Path, model: str) -> ModelSize:
    try:
        return _size(get_local_safetensors_metadata(folder), read_json(folder / "config.json"), here=True)
    except Exception as error:  # no config, no weights, damaged ones: the client's kinds are many
        raise SimDiffError(
            f"{model} is no Hugging Face model folder with safetensors weights: {one_line(error)}"
        ) from error


def _size(metadata: object, config: Mapping, here: bool) -> ModelSize:
    tensors = {
        name: tensor for file in metadata.files_metadata.values() for name, tensor in file.tensors.items()
    }
    n_bytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    outside = sum(
        tensor.parameter_count for name, tensor in tensors.items() if not re.search(r"\.\d+\.", name)
    )
    n_layers = (config.get("text_config") or config).get("num_hidden_layers") or config.get("n_layer") or 1
    return ModelSize(
        sum(tensor.parameter_count for tensor in tensors.values()), n_layers, outside, n_bytes, here
    )


def _size_of_gguf(path: Path) -> ModelSize:
    from gguf import GGUFReader

    counts = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(path).tensors}
    layers = {found[1] for name in counts if (found := re.match(r"blk\.(\d+)\.", name))}
    outside = sum(count for name, count in counts.items() if not name.startswith("blk."))
    return ModelSize(
        sum(counts.values()), len(layers) or 1, outside, 4 * sum(counts.values()), True
    )  # stored as float32


def estimate_needs(run: NotebookRun, size: ModelSize, gpu_gib: float = 0.0) -> Needs:
    """What a notebook run asks for, on a machine whose GPUs hold `gpu_gib` GiB each (0: without GPUs)."""
    number = run.notebook[:2]
    settings = Settings(**run.settings)
    dtype = settings.speed_dtype if number == "05" else settings.dtype
    item = _ITEM_BYTES.get(dtype, 2 if gpu_gib else 4)
    weights = size.n_parameters * item
    gradients = weights if number in ("02", "03", "06") and "taylor" in _methods(settings) else 0
    whole = _COPIES[number] * weights + gradients
    layer = (size.n_parameters - size.n_outside) / size.n_layers * item
    least = whole if number in _WHOLE or gradients else size.n_outside * item + 2 * layer
    n_gpus = ceil(whole / (0.8 * gpu_gib * _GIB)) if gpu_gib else 0
    operations = 2 * size.n_parameters * _count_tokens(number, settings)
    minutes = 20 + 3 * operations / _PER_SECOND["gpu" if gpu_gib else "cpu"] / 60
    written = size.n_bytes * (1 - settings.n_remove / size.n_layers) if number in ("03", "04") else 0
    return Needs(
        _PROCESS_GIB + whole / _GIB,
        1 + least / _GIB,
        n_gpus,
        min(10 * ceil(minutes / 10), _MOST_MINUTES),
        max(0, int(written)),
    )


def _methods(settings: Settings) -> set[str]:
    return {settings.criterion, *settings.criteria, *settings.task_criteria}


def _count_tokens(number: str, settings: Settings) -> float:
    """Tokens that go through the whole model, roughly; a backward pass counts as two forward."""
    s, calibration = settings, settings.n_samples * settings.seq_len
    validation, n_cells = s.n_validation * s.seq_len, len(s.criteria) * len(s.n_remove_grid)
    if number == "05":
        protocol = {"demo": 272, "interactive": 640, "prefill": 2048, "paper": 16 * 2052}[s.protocol]
        return (
            50 * max(s.speed_batch_sizes or [1]) * s.n_pairs * protocol
        )  # a decoded token takes the time of many read
    trained = {"demo": 8 * 4 * 256, "published": 2 * 52_002 * 256}[s.preset]
    if s.max_steps:
        trained = s.max_steps * 32 * (s.max_length or 256)
    documents = len(s.task_criteria) * (
        len(s.task_grid) * 8 * (s.task_limit or 3000) * 4 * 128 + s.n_stories * 15 * 500
    )
    return (
        calibration
        + {
            "01": 0,
            "02": _SETS * n_cells * validation,
            "03": n_cells * (s.n_test * s.seq_len + validation),
            "04": 4 * trained + 10 * s.n_test * s.seq_len,
            "06": n_cells * (s.n_windows * s.window_len + _SETS * validation) + documents,
        }[number]
    )


def check_grid(
    runs: Mapping[str, NotebookRun], there: set[str], folder: Path, here: bool, gpu_gib: float
) -> list[str]:
    """What would stop a grid, found before it starts: one sentence each, nothing where all is well.

    Args:
        runs: see `grid.plan_runs`.
        there: result files that need not be made again.
        folder: of the results.
        here: whether the notebooks run on this machine; else its memory says nothing.
        gpu_gib: memory of one GPU in GiB; 0: without.
    """
    problems, disk, known = [], 0, {}
    for name, run in runs.items():
        model = run.settings["model"]
        if model not in known and name not in there:
            try:
                known[model] = look_up(model)
            except SimDiffError as error:
                known[model] = None
                problems.append(str(error))
    total, short, fetched = psutil.virtual_memory().total / _GIB, {}, {}
    for name, run in runs.items():
        size = known.get(run.settings["model"])
        if size is None or name in there:
            continue
        fetched |= {} if size.here else {run.settings["model"]: size.n_bytes}
        needs = estimate_needs(run, size, gpu_gib)
        disk += needs.disk_bytes
        budget = run.settings.get("memory_gib") or total
        if here and not gpu_gib and needs.least_gib > budget:
            short[f"{run.notebook} of {run.settings['model']}"] = (
                f"needs about {needs.least_gib:.0f} GiB of memory and has {budget:.0f}: take a machine with more, or leave it out."
            )
    problems += [f"{what} {why}" for what, why in short.items()]
    cache = Path(os.environ.get("HF_HOME") or assets.cache_dir())
    for where, n_bytes, what in (
        (folder, disk, "what this grid writes"),
        (cache, sum(fetched.values()), "fetching this grid's models"),
    ):
        try:
            check_disk(where, n_bytes, what)
        except SimDiffError as error:
            problems.append(str(error))
    return problems
