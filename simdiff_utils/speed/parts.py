"""Where an eager decode step's time goes."""

import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.speed.timing import Protocol, _new_cache, _now, decode, fill_cache


@torch.inference_mode()
def time_parts(models: dict[str, PreTrainedModel], protocol: Protocol, n_steps: int = 16) -> pd.DataFrame:
    """Where an eager decode step's time goes, from marks before and after the modules inside the layers and
    the head.

    The models take their steps in turns; two untimed ones come first.

    Returns:
        one row per model and part: model, part (the modules' names in the layer, "norms" together, "head",
        "rest": embedding, masks, cache, residual sums and Python between them), seconds (median over steps).
    """
    token = torch.zeros(protocol.batch_size, 1, dtype=torch.long, device=next(iter(models.values())).device)
    caches = {
        name: fill_cache(model, _new_cache(model, False, 0), protocol.batch_size, protocol.prompt_len)
        for name, model in models.items()
    }
    marks, steps = {name: defaultdict(list) for name in models}, defaultdict(list)
    for _ in range(n_steps + 2):
        for name, model in models.items():
            hooks = [
                hook
                for part, module in _parts(model)
                for hook in _mark_around(module, marks[name][part], model)
            ]
            try:
                started = _mark(model)
                decode(model, token, caches[name], 1)
                steps[name].append((started, _mark(model)))
            finally:
                for hook in hooks:
                    hook.remove()
    rows = []
    for name, model in models.items():
        _now(model)  # marks on a GPU have happened
        parts = {
            part: np.array([_between(*ends) for ends in found]).reshape(n_steps + 2, -1).sum(axis=1)
            for part, found in marks[name].items()
        }
        parts["rest"] = np.array([_between(*ends) for ends in steps[name]]) - sum(parts.values())
        rows += [
            {"model": name, "part": part, "seconds": float(np.median(values[2:]))}
            for part, values in parts.items()
        ]
    return pd.DataFrame(rows)


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """What a step's time is told apart by: the modules with weights right inside the layers, and the head."""
    named = [(name, module) for layer in decoder_layers(model) for name, module in layer.named_children()]
    named = [("norms" if "norm" in type(module).__name__.lower() else name, module) for name, module in named]
    return [
        *((name, module) for name, module in named if next(module.parameters(), None) is not None),
        ("head", model.get_output_embeddings()),
    ]


def _mark_around(module: nn.Module, found: list, model: PreTrainedModel) -> list:
    started = []
    return [
        module.register_forward_pre_hook(lambda *_: started.append(_mark(model))),
        module.register_forward_hook(lambda *_: found.append((started.pop(), _mark(model)))),
    ]


def _mark(model: PreTrainedModel) -> object:
    """A point in time: of the processor, or in the order of what a GPU does (reading its clock would stop
    it)."""
    if model.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: object, end: object) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
