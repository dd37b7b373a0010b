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
    loss, z = _LinearCrossEntropy.apply(x, weight, targets, z_loss, chunk_tokens)  # type: ignore[no-untyped-call]
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
        loss, z, dx, dw = _chunked(x, weight, targets, z_loss, chunk_tokens, any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0], dw * grads[0], None, None, None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk_tokens: int, backward: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, z part, and (if asked) dx in x's dtype and dw in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss, z_sum = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x) if backward else None
    dw = torch.zeros_like(weight, dtype=wide) if backward else None
    # Two buffers serve every chunk: fresh memory for each would cost more in page faults than the
    # softmax in arithmetic.
    narrow_buffer = x.new_empty(min(chunk_tokens, x.shape[0]), weight.shape[0])
    wide_buffer = torch.empty_like(narrow_buffer, dtype=wide)
    for start in range(0, x.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        target, x_rows = targets[rows, None], x[rows]
        valid = (target != IGNORE_INDEX).to(wide)
        target = target.masked_fill(target == IGNORE_INDEX, 0)
        narrow = torch.mm(x_rows, weight.t(), out=narrow_buffer[: x_rows.shape[0]])
        p = wide_buffer[: x_rows.shape[0]].copy_(narrow)
        largest, target_logit = p.amax(-1, keepdim=True), p.gather(1, target)
        total = p.sub_(largest).exp_().sum(-1, keepdim=True)
        lse = largest + total.log()
        z = (lse.square() * valid).sum() * z_loss
        loss += ((lse - target_logit) * valid).sum() + z
        z_sum += z
        if dx is not None and dw is not None:
            p.mul_(valid * (1 + 2 * z_loss * lse) / total).scatter_add_(1, target, -valid)
            narrow.copy_(p)
            torch.mm(narrow, weight, out=dx[rows])
            if narrow.dtype == wide:
                dw.addmm_(narrow.t(), x_rows)
            else:
                dw += narrow.t() @ x_rows
    return loss, z_sum, dx, dw
