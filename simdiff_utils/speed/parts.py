"""Where an eager decode step's time goes."""

import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.speed.generate import Protocol, decode, fill_cache, new_cache, now

_WARM_UP = 2  # untimed steps


@torch.inference_mode()
def time_parts(models: dict[str, PreTrainedModel], protocol: Protocol, n_steps: int = 16) -> pd.DataFrame:
    """Where an eager decode step's time goes, from marks before and after the modules inside the layers and
    the head.

    The models take their steps in turns; two untimed ones come first.

    Returns:
        one row per model and part: model, part (the modules' names in the layer, "norms" together, "head",
        "rest": embedding, masks, cache, residual sums and Python between them), seconds (median over steps).
    """
    batch_size, device = protocol.batch_size, next(iter(models.values())).device
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    caches = {
        name: fill_cache(model, new_cache(model), batch_size, protocol.prompt_len)
        for name, model in models.items()
    }
    marks, steps = {name: defaultdict(list) for name in models}, defaultdict(list)
    for _ in range(_WARM_UP + n_steps):
        for name, model in models.items():
            found = marks[name]
            hooks = [hook for part, module in _parts(model) for hook in _mark_around(module, found[part])]
            try:
                started = _mark(device)
                decode(model, token, caches[name], 1)
                steps[name].append((started, _mark(device)))
            finally:
                for hook in hooks:
                    hook.remove()
    now(device)  # marks on a GPU have happened
    rows = []
    for name, found in marks.items():
        parts = {part: _seconds(ends, _WARM_UP + n_steps) for part, ends in found.items()}
        parts["rest"] = _seconds(steps[name], _WARM_UP + n_steps) - sum(parts.values())
        rows += [(name, part, float(np.median(values[_WARM_UP:]))) for part, values in parts.items()]
    return pd.DataFrame(rows, columns=["model", "part", "seconds"])


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """What a step's time is told apart by: the modules with weights right inside the layers, and the head."""
    named = [(name, module) for layer in decoder_layers(model) for name, module in layer.named_children()]
    named = [("norms" if "norm" in type(module).__name__.lower() else name, module) for name, module in named]
    return [
        *((name, module) for name, module in named if next(module.parameters(), None) is not None),
        ("head", model.get_output_embeddings()),
    ]


def _mark_around(module: nn.Module, found: list[tuple]) -> list:
    started, device = [], next(module.parameters()).device
    return [
        module.register_forward_pre_hook(lambda *_: started.append(_mark(device))),
        module.register_forward_hook(lambda *_: found.append((started.pop(), _mark(device)))),
    ]


def _mark(device: torch.device) -> object:
    """A point in time: of the processor, or in the order of what a GPU does (reading its clock would stop
    it)."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(marks: list[tuple], n_steps: int) -> np.ndarray:
    """Time between pairs of marks, summed over the layers: seconds [n_steps]."""
    passed = [
        end - start if isinstance(start, float) else start.elapsed_time(end) / 1000 for start, end in marks
    ]
    return np.reshape(passed, (n_steps, -1)).sum(axis=1)
