"""Could something cheaper than an evaluation say which layer greedy removal takes next?

    python -m benchmarks.estimates smollm2 gemma qwen-0.5b [--blocks 6]

Plain greedy search is run with every candidate measured. At each of its steps every estimate ranks the layers
that are left; `needed` is the place of the layer that greedy takes: so many candidates a search has to
measure that goes through them in the estimate's order and knows when to stop. `spearman` is the rank
correlation with the measured losses. A random order needs (n + 1) / 2 of n on average.

- `first`: the losses without each single layer, measured once (n_layers evaluations).
- `previous`: what the layer cost the step before (what the lazy search has at no cost).
- `cosine`, `relative`: captured once on the dense model.
- `cosine again`, `relative again`: captured on the model cut so far, at every step.
- `gate`: -dL/dg of a gate on each layer's update at 1, on the model cut so far, at every step.
- `gate, 2nd order`: that with half the gates' empirical Fisher information (block by block) added.
- `energy`: gradient and Fisher matrix of the dense model's gates, taken once: the energy of the cut so far
  with one more layer (as arXiv:2602.00161 has it for all K).
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.comparison import EMBEDDED, write_rows
from benchmarks.search import BATCH_SIZE, GRIDS
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.criterion.equations import cosine_scores, normalise
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.surgery import layers_removed
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

TARGET = Path("benchmarks/results/estimates.csv")
Estimates = dict[str, np.ndarray]  # name -> one a layer that is left, in their order


def gate_gradients(model: PreTrainedModel, blocks: Tensor) -> np.ndarray:
    """dL/dg of a gate g = 1 on every layer's update (h + g (layer(h) - h)), float64 [n_blocks, n_layers]."""
    layers = decoder_layers(model)
    gates = torch.ones(len(layers), dtype=torch.float32, requires_grad=True)

    def gated(layer_idx: int) -> Callable:
        def hook(_module, inputs, kwargs, output):
            before = inputs[0] if inputs else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            mixed = before + gates[layer_idx].to(after.dtype) * (after - before)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    found = []
    with ExitStack() as hooks:
        for layer_idx, layer in enumerate(layers):
            handle = layer.register_forward_hook(gated(layer_idx), with_kwargs=True)
            hooks.callback(handle.remove)
        for block in blocks:
            logits = model(block[None, :], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, block[1:])
            found.append(torch.autograd.grad(loss, gates)[0].double().numpy())
    return np.array(found)


class Greedy:
    """Greedy removal with all of its candidates measured, and what the estimates say at each step."""

    def __init__(self, model: str, n_blocks: int) -> None:
        self.run = Run(
            Settings(model=EMBEDDED[model], n_validation=n_blocks, batch_size=BATCH_SIZE, dtype="float32")
        )
        self.blocks = self.run.blocks("validation")
        kept = self.run.folder / f"benchmark-estimates-{n_blocks}"
        self.evaluator = Evaluator(self.run.decoder, self.blocks, BATCH_SIZE, kept)
        self.n_layers, self.n_steps = self.run.n_layers, max(GRIDS[model])
        self.run.model.requires_grad_(False)

    def rows(self) -> list[dict]:
        order, measured, rows = [], [], []  # measured: layer -> loss, step by step
        dense = self.look_at([])
        for step in range(self.n_steps):
            left = [i for i in range(self.n_layers) if i not in order]
            losses = self.evaluator.losses([frozenset({*order, i}) for i in left]).mean(1)
            best = int(losses.argmin())
            now = self.look_at(order) if order else dense
            for name, values in estimate(order, left, dense, now, measured).items():
                place = 1 + int((values < values[best]).sum())
                rows.append({"step": step + 1, "estimate": name, "needed": place, "of": len(left)})
                rows[-1]["spearman"] = round(float(spearmanr(values, losses).statistic), 3)
            measured.append(dict(zip(left, losses, strict=True)))
            order.append(left[best])
            needed = {row["estimate"]: row["needed"] for row in rows if row["step"] == step + 1}
            print(step + 1, order[-1], needed, flush=True)
        return rows

    def look_at(self, order: list[int]) -> tuple[np.ndarray, Estimates]:
        """Gradients of the gates, [n_blocks, n_left], and the captured scores of the model cut so far."""
        with layers_removed(self.run.model, frozenset(order)) as cut:
            table = capture_statistics(Decoder(cut), self.blocks, BATCH_SIZE).table()
            scores = {"cosine": cosine_scores(table), "relative": normalise(table, "relative")[1]}
            return gate_gradients(cut, self.blocks), scores


def estimate(
    order: list[int],
    left: list[int],
    dense: tuple[np.ndarray, Estimates],
    now: tuple[np.ndarray, Estimates],
    measured: list[dict[int, float]],
) -> Estimates:
    """What every estimate says of the layers that are left, given the dense model and the one cut so far."""
    found = {name: scores[left] for name, scores in dense[1].items()}
    found |= {f"{name} again": scores for name, scores in now[1].items()}
    found["gate"] = -now[0].mean(0)
    found["gate, 2nd order"] = found["gate"] + (now[0] ** 2).mean(0) / 2
    out = np.zeros((len(left), dense[0].shape[1]))  # a row a candidate: 1 where a layer is gone
    out[:, order] = 1
    out[range(len(left)), left] = 1
    found["energy"] = -out @ dense[0].mean(0) + ((out @ dense[0].T) ** 2).mean(1) / 2
    if measured:
        found["first"] = np.array([measured[0][i] for i in left])
        found["previous"] = np.array([measured[-1][i] for i in left])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", choices=GRIDS)
    parser.add_argument("--blocks", type=int, default=6, help="of validation, 256 tokens each")
    given = parser.parse_args()
    for model in given.models:
        chain = Greedy(model, given.blocks)
        rows = pd.DataFrame(chain.rows())
        summary = rows.groupby("estimate").agg(
            needed=("needed", "mean"),
            worst=("needed", "max"),
            spearman=("spearman", "mean"),
            steps=("step", "size"),
        )
        print(summary.round(2).sort_values("needed").to_string(), flush=True)
        rows = rows.assign(model=chain.run.checkpoint.label)
        write_rows(rows, TARGET, f"python -m benchmarks.estimates {model} --blocks {given.blocks}")


if __name__ == "__main__":
    main()
