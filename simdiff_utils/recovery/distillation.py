"""Distillation: half the divergence from the dense model, half the token that came, in chunks of
positions."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.logits import logits_in_chunks, rows_in_cache
from simdiff_utils.engine.stubs import states_of


def distillation_loss(
    student: Decoder, teacher: Decoder, states: Tensor, wanted: Tensor, tokens: Tensor
) -> Tensor:
    """Half the KL divergence of the student's next-token distribution from the teacher's, half the loss on
    the token that came, summed over positions, in nats.

    The weighted objective of Hinton et al. (arXiv:1503.02531) at temperature 1 and equal weights. The
    divergence alone, which Minitron (arXiv:2407.14679) heals by, cannot learn what the text has to teach
    beyond what the dense model knows. Logits exist for a chunk of positions at a time, whose gradient with
    respect to the states is taken at once. Where q is the student's distribution and p the teacher's,
    that with respect to the logits is q - (p + what came) / 2.

    Args:
        states: of the student as its last layer leaves them, [n, d]; gradients flow into them, not into norm
            or head.
        wanted: of the teacher, [n, d].
        tokens: the ids that followed, [n].

    Returns:
        a scalar, at least 0.
    """
    gradient, total = torch.empty_like(states), states.new_zeros((), dtype=torch.float32)
    with torch.no_grad():
        beside = (gradient, states.detach(), tokens)
        for target, part, own, following in logits_in_chunks(teacher, wanted, *beside):
            with torch.enable_grad():
                found = student.logits(own.requires_grad_()[:, None])[:, 0]
            slopes = torch.empty_like(found)  # of the loss, with respect to the logits
            came = following.to(found.device)[:, None]
            for mine, wished, next_id, slope in rows_in_cache(
                found.detach(), target.to(found.device), came, slopes
            ):
                log_q, log_p = mine.float().log_softmax(-1), wished.float().log_softmax(-1)
                q, p = log_q.exp(), log_p.exp()
                total += ((p * log_p.sub_(log_q)).sum() - log_q.gather(1, next_id).sum()) / 2
                half = next_id.new_full(next_id.shape, -0.5, dtype=q.dtype)
                slope.copy_(q.sub_(p, alpha=0.5).scatter_add_(1, next_id, half))
            part.copy_(*torch.autograd.grad(found, own, slopes))
    linear = (states * gradient).sum()  # whose gradient is the one wanted, and whose value is not
    return linear - linear.detach() + total


def last_states(model: nn.Module, inner: PreTrainedModel, inputs: dict) -> Tensor:
    """States [batch, seq, d] as the last decoder layer leaves them; the logits of a single position are all
    it costs."""
    caught = []
    hook = decoder_layers(inner)[-1].register_forward_hook(
        lambda _module, _args, output: caught.append(output)
    )
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return states_of(caught[0])
