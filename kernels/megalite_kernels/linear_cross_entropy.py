"""Output projection and cross-entropy in one, in chunks of tokens.

The logits of one chunk exist at a time, and their gradient is formed in the forward pass (6·T·d·V
operations instead of the 8·T·d·V that computing the logits again would take), so a vocabulary of
any size costs one chunk of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve

IGNORE_INDEX = -100
_CPU_ROWS = 32


class VocabShard(NamedTuple):
    """A rank's rows of a vocabulary divided among ranks.

    `first_id` is the token of its first row. `gather` returns the tensors that all ranks pass to it in
    the same call, stacked in rank order: [rows, 2] becomes [ranks, rows, 2].
    """

    first_id: int
    gather: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 512,
    vocab_shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of `x @ weightᵀ` against `targets`, plus the z-loss.

    loss = Σ_t lse_t - logit_t[target_t] + z_loss · lse_t²  over the t whose target is not -100.
    Softmax and sums are in fp32 (or wider). Returns the loss, and the part of it that is z-loss,
    which carries no gradient of its own; both 0-dim.

    With a `vocab_shard`, `weight` is one rank's rows, every rank gets the same loss, the weight's
    gradient is that of its rows, and x's gradient is a rank's share, to be summed over the ranks. Two
    numbers a token are exchanged, never logits.

    Shapes:  x [tokens, hidden]; weight [vocab, hidden]; targets [tokens] int64
    Raises:  IndexError or RuntimeError from torch if a target is neither -100 nor in the vocabulary
    Source:  z-loss from Chowdhery et al. 2022 (PaLM), section 5
    """
    if resolve(impl, "linear_cross_entropy", x) == "reference" and vocab_shard is None:
        return linear_cross_entropy_reference(x, weight, targets, z_loss=z_loss)
    loss, z = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, z_loss, chunk_tokens, vocab_shard
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
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk_tokens: int,
        shard: VocabShard | None,
    ) -> tuple[Tensor, Tensor]:
        backward = any(ctx.needs_input_grad[:2])
        loss, z, dx, dw = _chunked(x, weight, targets, z_loss, chunk_tokens, backward, shard)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0], dw * grads[0], None, None, None, None


def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_tokens: int,
    backward: bool,
    shard: VocabShard | None,
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
        stats = None if shard is None else _shared_stats(logits, chunk_targets, block, shard)
        for low in range(0, rows.shape[0], block):
            part, part_targets = logits[low : low + block], chunk_targets[low : low + block]
            if shard is None or stats is None:
                gradient, row_sums = _softmax_rows(part, part_targets, z_loss)
            else:
                local = _local(part_targets, shard, weight.shape[0])
                gradient, row_sums = _shard_rows(part, part_targets, local, stats[low : low + block], z_loss)
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
    factor, at_target, sums = _row_terms(valid, lse, target_logit, z_loss)
    gradient = p.mul_(factor).to(logits.dtype)
    gradient.scatter_(1, target, at_target.to(logits.dtype))
    return gradient, sums


def _row_terms(
    valid: Tensor, lse: Tensor, target_logit: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row's probabilities are multiplied by, the gradient at its target, and [loss, z part].

    Shapes:  valid (0 or 1), lse and target_logit [rows, 1]; returns two of [rows, 1], and [2]
    """
    z = z_loss * lse.square() * valid
    loss = (lse - target_logit) * valid + z
    factor = valid * (1 + 2 * z_loss * lse)
    # The target's element is p - 1, formed in fp32: near p = 1 a rounded p would leave nothing.
    at_target = (target_logit - lse).exp() * factor - valid
    return factor, at_target, torch.cat((loss.sum()[None], z.sum()[None]))


# --- a vocabulary divided among ranks ---------------------------------------------------------


def _local(targets: Tensor, shard: VocabShard, size: int) -> Tensor:
    """Each target's row in this shard, or -1 where another rank holds it."""
    local = targets - shard.first_id
    return local.where((local >= 0) & (local < size), -1)


def _shared_stats(logits: Tensor, targets: Tensor, block: int, shard: VocabShard) -> Tensor:
    """Every row's log-sum-exp over the whole vocabulary and its target's logit, from one exchange.

    Shapes:  logits [rows, vocab/ranks]; targets [rows, 1]; returns [rows, 2] in at least fp32
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    local = _local(targets, shard, logits.shape[1])
    stats = logits.new_empty(logits.shape[0], 2, dtype=wide)
    for low in range(0, logits.shape[0], block):
        part = logits[low : low + block].to(wide)
        stats[low : low + block, 0] = part.logsumexp(-1)
    stats[:, 1:] = logits.gather(1, local.clamp_min(0)).to(wide).masked_fill_(local < 0, 0.0)
    gathered = shard.gather(stats)
    return torch.stack((gathered[..., 0].logsumexp(0), gathered[..., 1].sum(0)), -1)


def _shard_rows(
    logits: Tensor, target: Tensor, local: Tensor, stats: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`_softmax_rows` for a shard's logits, from the `stats` of whole rows.

    Shapes:  logits [rows, vocab/ranks]; target, local [rows, 1]; stats [rows, 2]
    """
    valid = (target != IGNORE_INDEX).to(stats.dtype)
    lse, target_logit = stats[:, :1], stats[:, 1:]
    factor, at_target, sums = _row_terms(valid, lse, target_logit, z_loss)
    gradient = (logits.to(stats.dtype) - lse).exp_().mul_(factor).to(logits.dtype)
    held = gradient.gather(1, local.clamp_min(0))
    gradient.scatter_(1, local.clamp_min(0), at_target.to(logits.dtype).where(local >= 0, held))
    return gradient, sums
