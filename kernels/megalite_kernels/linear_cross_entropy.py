"""Output projection and cross-entropy in one, in chunks of tokens.

The logits of one chunk exist at a time, and their gradient is formed in the forward pass (6·T·d·V
operations instead of the 8·T·d·V that computing the logits again would take), so a vocabulary of
any size costs one chunk of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve

IGNORE_INDEX = -100
_CPU_ROWS = 32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 512,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of `x @ weightᵀ` against `targets`, plus the z-loss.

    loss = Σ_t lse_t - logit_t[target_t] + z_loss · lse_t²  over the t whose target is not -100.
    Softmax and sums are in fp32 (or wider). Returns the loss, and the part of it that is z-loss,
    which carries no gradient of its own; both 0-dim.

    Shapes:  x [tokens, hidden]; weight [vocab, hidden]; targets [tokens] int64
    Raises:  IndexError or RuntimeError from torch if a target is neither -100 nor in the vocabulary
    Source:  z-loss from Chowdhery et al. 2022 (PaLM), section 5
    """
    if resolve(impl) == "reference":
        return linear_cross_entropy_reference(x, weight, targets, z_loss=z_loss)
    loss, z = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, z_loss, chunk_tokens
    )
    return loss, z


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` as its formula reads, all logits at once."""
    logits = x @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    lse = logits.logsumexp(-1).masked_fill(targets == IGNORE_INDEX, 0.0)
    z = z_loss * lse.square().sum()
    return ce + z, z.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        backward = any(ctx.needs_input_grad[:2])
        loss, z, dx, dw = _chunked(x, weight, targets, z_loss, chunk_tokens, backward)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0], dw * grads[0], None, None, None


def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_tokens: int,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, z part, and (if asked) dx in x's dtype and dw in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_zeros(2, dtype=wide)
    dx = torch.empty_like(x) if backward else None
    dw = torch.empty_like(weight, dtype=wide) if backward else None
    if dw is not None and not x.shape[0]:
        dw.zero_()
    # On CPU the fp32 work is done a few rows at a time, so that it stays in a core's cache.
    block = _CPU_ROWS if x.device.type == "cpu" else chunk_tokens
    # One buffer serves every chunk: fresh memory for each would cost more in page faults than the
    # softmax in arithmetic.
    buffer = x.new_empty(min(chunk_tokens, x.shape[0]), weight.shape[0])
    for start in range(0, x.shape[0], chunk_tokens):
        rows, chunk_targets = x[start : start + chunk_tokens], targets[start : start + chunk_tokens, None]
        logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
        for low in range(0, rows.shape[0], block):
            part = logits[low : low + block]
            gradient, row_sums = _softmax_rows(part, chunk_targets[low : low + block], z_loss)
            sums += row_sums
            if backward:
                part.copy_(gradient)
        if dx is not None and dw is not None:
            torch.mm(logits, weight, out=dx[start : start + chunk_tokens])
            if start == 0:
                dw.copy_(logits.t() @ rows)
            elif logits.dtype == wide:
                dw.addmm_(logits.t(), rows)
            else:
                dw += logits.t() @ rows
    return sums[0], sums[1], dx, dw


def _softmax_rows(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss in the logits' dtype, and [loss, z part of it] in at least fp32.

    Shapes:  logits [rows, vocab]; target [rows, 1]
    """
    valid = (target != IGNORE_INDEX).to(torch.promote_types(logits.dtype, torch.float32))
    target = target.masked_fill(target == IGNORE_INDEX, 0)
    wide = logits.to(valid.dtype)
    p = wide.softmax(-1)
    # The largest probability is exp(largest logit - lse): the row's log-sum-exp for the price of two
    # maxima, where a logsumexp would compute every exponential again.
    lse = wide.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    target_logit = wide.gather(1, target)
    z = z_loss * lse.square() * valid
    loss = (lse - target_logit) * valid + z
    factor = valid * (1 + 2 * z_loss * lse)
    gradient = p.mul_(factor).to(logits.dtype)
    # The target's element is p - 1, formed in fp32: near p = 1 a rounded p would leave nothing.
    at_target = (target_logit - lse).exp() * factor - valid
    gradient.scatter_(1, target, at_target.to(logits.dtype))
    return gradient, torch.cat((loss.sum()[None], z.sum()[None]))
