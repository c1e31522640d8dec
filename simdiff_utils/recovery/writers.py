"""What writes to the residual stream: the modules of a decoder layer whose output is added to its states.

No table of model types. Noise is added to what a module gives: if the layer's own output moves by that noise,
the module writes. Everything is learnt from the first batch, through hooks, with the layer as it is.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from simdiff_utils.engine.decoder import Through


@dataclass(frozen=True)
class Writer:
    """A module whose output its layer adds to the residual stream.

    Attributes:
        name, module: as in the layer.
        gain: how many times it is added; 1 but for a few families (Granite).
    """

    name: str
    module: nn.Module
    gain: float

    @property
    def adjustable(self) -> bool:
        """A linear map or a norm in floating point: no set of experts, nothing quantised."""
        weight = getattr(self.module, "weight", None)
        if weight is None or not weight.is_floating_point():
            return False
        names = {name for name, _ in self.module.named_parameters()}
        known = self.per_channel or isinstance(self.module, (nn.Linear, Conv1D))
        return known and names <= {"weight", "bias"}

    @property
    def per_channel(self) -> bool:
        """A norm: one weight a channel."""
        return self.module.weight.dim() == 1

    @property
    def _matrix(self) -> Tensor:
        """The weights of a linear map as [f, d], however they are stored; of a norm [d]."""
        return self.module.weight.T if isinstance(self.module, nn.Linear) else self.module.weight

    def features(self, given: Tensor) -> Tensor:
        """What a change D of the weights is multiplied with on its way into the stream, float64 [tokens, f]:
        the module's input, with a 1 for the bias; of a norm [tokens, d], the normed input, for w as for 1 + w
        (Gemma)."""
        if self.per_channel:
            return self.gain * (self._output(given, 1) - self._output(given, 0))
        x = given.flatten(0, -2).double()
        return self.gain * (x if self.module.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1))

    def add(self, change: Tensor) -> None:
        """Change the weights by D, [f, d] with the bias in the last row, or [d]."""
        n_rows, change = len(self._matrix), change.to(self._matrix.device)
        self._matrix.copy_(self._matrix.double() + change[:n_rows])
        if len(change) > n_rows:
            self.module.bias.copy_(self.module.bias.double() + change[n_rows])

    def scale(self, factor: float) -> None:
        """Multiply what is written; what a norm adds to its weight (Gemma: 1) is seen where its weight is
        0."""
        offset = 0.0
        if self.per_channel:
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(8, len(self._matrix), generator=generator).to(self._matrix)
            one, zero = (self._output(probe, value, 0) for value in (1, 0))
            offset = round(((one - zero) * zero).sum().item() / (one - zero).square().sum().item())
        self._matrix.copy_((self._matrix.double() + offset) * factor - offset)
        if getattr(self.module, "bias", None) is not None:
            self.module.bias.mul_(factor)

    def _output(self, given: Tensor, weight: float, bias: float | None = None) -> Tensor:
        """What a norm gives with one value for all weights, float64 [tokens, d]."""
        wanted, values = {"weight": weight, "bias": bias}, {}
        for name, parameter in self.module.named_parameters():
            if wanted[name] is not None:
                values[name] = torch.full_like(parameter, wanted[name])
        return functional_call(self.module, values, (given,)).double().flatten(0, -2)


def find_writers(layer: nn.Module, through: Through, hold: bool) -> list[Writer]:
    """The modules of a layer that write to the residual stream, last to first.

    Args:
        through: the layer on every batch, see `Decoder.run`.
        hold: while a module is tried, what the later writers give stays as it was. So all that write are
            found, those too that a later one reads (attention before an MLP); without, those that nothing
            reads.
    """
    modules = {module: name for name, module in layer.named_modules() if module._parameters}
    gave = {}  # in the order in which they finished

    def record(module: nn.Module, _given: tuple, output: object) -> None:
        gave.pop(module, None)
        if isinstance(output, Tensor):
            gave[module] = output.clone()  # Falcon adds to it in place

    with hooked(modules, record):
        _, after = next(through())
    size = after.float().norm(dim=-1, keepdim=True) / after.shape[-1] ** 0.5  # less would drown in rounding
    tolerance = max(1e-3, 4 * torch.finfo(after.dtype).eps)
    generator, found = torch.Generator().manual_seed(0), []
    answers = {}  # what some modules are made to give

    def answer(module: nn.Module, _given: tuple, _output: object) -> Tensor | None:
        return answers[module].clone() if module in answers else None

    with hooked(modules, answer):
        for module, output in reversed(gave.items()):
            if output.shape[-1] != after.shape[-1] or output.numel() != after.numel():
                continue
            # Give noise on top, as large as the states, and see by how much of it the layer's answer moves.
            noise = (torch.randn(after.shape, generator=generator).to(size) * size).to(after.dtype).float()
            answers[module] = (output.float() + noise.view_as(output).to(output.device)).to(output.dtype)
            moved = next(through())[1].float() - after.float()
            del answers[module]
            gain = ((moved * noise).sum(-1) / noise.square().sum(-1)).median().item()
            if abs(gain) > tolerance and difference(moved, gain * noise) < tolerance:  # by it, and no other
                found.append(Writer(modules[module], module, gain))
                if hold:
                    answers[module] = output
    return found


def ignores_scale(layer: nn.Module, through: Through, writers: list[Writer]) -> bool:
    """Whether a stream twice as large changes nothing that these writers give, and nothing else is added to
    it: with states and answers doubled, the writers still give what they gave, and the layer leaves twice
        what it left."""
    usual, doubled, modules = {}, {}, [writer.module for writer in writers]
    with hooked(modules, lambda module, _given, output: usual.update({module: output.clone()})):
        _, after = next(through())

    def answer(module: nn.Module, _given: tuple, output: Tensor) -> Tensor:
        doubled[module] = output.clone()
        return 2 * usual[module]

    def double(_layer: nn.Module, given: tuple) -> tuple:
        return 2 * given[0], *given[1:]

    with hooked(modules, answer), layer.register_forward_pre_hook(double):
        _, twice = next(through())
    pairs = [(twice, 2 * after), *((doubled[module], usual[module]) for module in modules)]
    return all(difference(found, wanted) < 0.05 for found, wanted in pairs)  # rounding, and a norm's epsilon


def hooked(modules: Iterable[nn.Module], hook: Callable) -> ExitStack:
    """A forward hook on some modules, for as long as a `with` block lasts."""
    stack = ExitStack()
    for module in modules:
        stack.enter_context(module.register_forward_hook(hook))
    return stack


def difference(found: Tensor, wanted: Tensor) -> float:
    """Median over the tokens of |found - wanted| / |wanted|."""
    return ((found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)).median().item()
