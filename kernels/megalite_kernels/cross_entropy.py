"""Cross-entropy whose gradient takes the place of the logits.

The gradient of a row needs nothing but the row, so the forward pass that has it at hand forms it at once:
logits are read twice and written once, and nothing of their size is ever kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, Resolved, resolve

IGNORE_INDEX = -100
_CPU_ROWS = 32  # on CPU so many rows at a time, so that the fp32 work stays in a core's cache


class VocabShard(NamedTuple):
    """A rank's rows of a vocabulary of `vocab_size` divided among ranks.

    `first_id` is the token of its first row. `gather` returns the tensors that all ranks pass to it in
    the same call, stacked in rank order: [rows, 2] becomes [ranks, rows, 2].
    """

    first_id: int
    vocab_size: int
    gather: Callable[[Tensor], Tensor]


class Terms(NamedTuple):
    """What is added to plain cross-entropy: the z-loss's weight, and the share of label smoothing."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of rows of logits, which are overwritten by their gradient.

    loss = Σ_t lse_t - (1-ε) · logit_t[target_t] - ε · mean(logit_t) + z_loss · lse_t²  over the t whose
    target is not -100, with ε the label smoothing. Softmax and sums are in fp32 (or wider). Returns the
    loss, and the part of it that is z-loss, which carries no gradient of its own; both 0-dim. Logits
    that need no gradient are left as they are.

    With a `vocab_shard`, logits are those of one rank's rows of the vocabulary, and every rank gets the
    same loss. Two numbers a row are exchanged, three with label smoothing.

    Shapes:  logits [rows, vocab], the last dimension contiguous; targets [rows] int64
    Raises:  ValueError for logits of another layout; IndexError or RuntimeError from torch if a target is
             neither -100 nor in the vocabulary, where kernels and shards give a loss of NaN instead
    Source:  label smoothing from Szegedy et al. 2016, section 7; z-loss from Chowdhery et al. 2022
             (PaLM), section 5
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        layout = f"shape {tuple(logits.shape)} and strides {logits.stride()}"
        raise ValueError(f"logits of {layout}; must be [rows, vocab] with a contiguous last dimension")
    chosen = resolve(impl, "cross_entropy", logits)
    terms = Terms(z_loss, label_smoothing)
    if chosen == "reference" and vocab_shard is None:
        return cross_entropy_reference(logits, targets, terms)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, z = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, terms, vocab_shard, wants_gradient, chosen
    )
    return loss, z


def cross_entropy_reference(logits: Tensor, targets: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` as its formula reads; the logits are left as they are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce = F.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=terms.label_smoothing
    )
    lse = logits.logsumexp(-1).masked_fill(targets == IGNORE_INDEX, 0.0)
    z = terms.z_loss * lse.square().sum()
    return ce + z, z.detach()


def cost(rows: int, vocab: int, element_bytes: int) -> Cost:
    """Loss and gradient of [rows, vocab] logits: two reads and a write (once through would need the row on
    chip); per logit max, exponential and sum, and again exponential and product."""
    return Cost(8 * rows * vocab, 3 * rows * vocab * element_bytes + 8 * rows)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        terms: Terms,
        shard: VocabShard | None,
        wants_gradient: bool,
        chosen: Resolved,
    ) -> tuple[Tensor, Tensor]:
        sums = replace_by_gradient(logits, targets, terms, shard, wants_gradient, chosen)
        ctx.save_for_backward(logits)
        loss, z = sums.unbind()
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale_owned(gradient.detach(), grads[0]), None, None, None, None, None


def scale_owned(gradient: Tensor, factor: Tensor) -> Tensor:
    """For a backward pass: a saved gradient times a 0-dim factor, in its own memory if this pass is its last.

    Only with retain_graph can another pass come, which needs what was saved as it was.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    return gradient.mul_(factor)


def replace_by_gradient(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    shard: VocabShard | None,
    wants_gradient: bool,
    chosen: Resolved,
) -> Tensor:
    """Sums [loss, z part of it] in at least fp32; with `wants_gradient` the logits become their gradient."""
    if chosen == "triton":
        from megalite_kernels.gpu import cross_entropy as gpu

        first_id, vocab = (0, logits.shape[1]) if shard is None else shard[:2]
        statistics = None
        if shard is not None:
            local = gpu.statistics(logits, targets, first_id, terms.label_smoothing != 0)
            statistics = _combined(shard.gather(local))
        found: Tensor = gpu.loss(logits, targets, statistics, first_id, vocab, *terms, wants_gradient)
        return found
    targets = targets[:, None]
    block = _CPU_ROWS if logits.device.type == "cpu" else max(logits.shape[0], 1)
    if shard is None:
        return _whole_rows(logits, targets, terms, block, wants_gradient)
    statistics = _shared_statistics(logits, targets, terms, block, shard)
    sums = logits.new_zeros(2, dtype=statistics.dtype)
    for low in range(0, logits.shape[0], block):
        rows = slice(low, low + block)
        gradient, row_sums = _shard_rows(logits[rows], targets[rows], statistics[rows], terms, shard)
        sums += row_sums
        if wants_gradient:
            logits[rows] = gradient
    return sums


# --- in torch ---------------------------------------------------------------------------------


def _whole_rows(logits: Tensor, target: Tensor, terms: Terms, block: int, wants_gradient: bool) -> Tensor:
    """`replace_by_gradient`, the exponentials and what else meets every logit in blocks of rows.

    Shapes:  logits [rows, vocab]; target [rows, 1]
    """
    valid = (target != IGNORE_INDEX).to(torch.promote_types(logits.dtype, torch.float32))
    target = target.masked_fill(target == IGNORE_INDEX, 0)
    target_logit = logits.gather(1, target).to(valid.dtype)
    lse = torch.empty_like(valid)
    mean = torch.empty_like(valid) if terms.label_smoothing else None
    for low in range(0, logits.shape[0], block):
        rows = slice(low, low + block)
        wide = logits[rows].to(valid.dtype)
        p = wide.softmax(-1)
        # The largest probability is exp(largest logit - lse): the row's log-sum-exp for the price of
        # two maxima, where a logsumexp would compute every exponential again.
        lse[rows] = wide.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        if mean is not None:
            mean[rows] = wide.mean(-1, keepdim=True)
        if wants_gradient:
            p.mul_(_factor(valid[rows], lse[rows], terms))
            if terms.label_smoothing:
                p -= valid[rows] * (terms.label_smoothing / logits.shape[1])
            logits[rows] = p
    at_target, sums = _row_terms(valid, lse, target_logit, mean, terms)
    if wants_gradient:
        at_target -= valid * (terms.label_smoothing / logits.shape[1])
        _put(logits, target, at_target)
    return sums


def _put(rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """rows[i, columns[i]] = values[i]. On CPU `scatter_` would copy all of the rows.

    Shapes:  rows [n, m]; columns, values [n, 1]
    """
    n = torch.arange(rows.shape[0], device=rows.device)
    rows[n, columns[:, 0]] = values[:, 0].to(rows.dtype)


def _factor(valid: Tensor, lse: Tensor, terms: Terms) -> Tensor:
    """What each row's probabilities are multiplied by; all [rows, 1]."""
    return valid * (1 + 2 * terms.z_loss * lse)


def _row_terms(
    valid: Tensor, lse: Tensor, target_logit: Tensor, mean: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    """The gradient at each row's target but for what label smoothing takes from every logit, and
    [loss, z part].

    Shapes:  valid (0 or 1), lse, target_logit and mean [rows, 1]; returns [rows, 1], and [2]
    """
    sharp = 1 - terms.label_smoothing
    z = terms.z_loss * lse.square() * valid
    aim = target_logit if mean is None else sharp * target_logit + terms.label_smoothing * mean
    loss = (lse - aim) * valid + z
    # The target's element is p - 1, formed in fp32: near p = 1 a rounded p would leave nothing.
    at_target = (target_logit - lse).exp() * _factor(valid, lse, terms) - valid * sharp
    return at_target, torch.cat((loss.sum()[None], z.sum()[None]))


# --- a vocabulary divided among ranks ---------------------------------------------------------


def _local(targets: Tensor, shard: VocabShard, size: int) -> Tensor:
    """Each target's row in this shard, or -1 where another rank holds it."""
    local = targets - shard.first_id
    return local.where((local >= 0) & (local < size), -1)


def _shared_statistics(
    logits: Tensor, targets: Tensor, terms: Terms, block: int, shard: VocabShard
) -> Tensor:
    """Every row's log-sum-exp over the whole vocabulary, its target's logit and, with label smoothing, the
    sum of its logits, from one exchange.

    Shapes:  logits [rows, vocab/ranks]; targets [rows, 1]; returns [rows, 2 or 3] in at least fp32
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    local = _local(targets, shard, logits.shape[1])
    statistics = logits.new_empty(logits.shape[0], 3 if terms.label_smoothing else 2, dtype=wide)
    for low in range(0, logits.shape[0], block):
        part = logits[low : low + block].to(wide)
        statistics[low : low + block, 0] = part.logsumexp(-1)
        if terms.label_smoothing:
            statistics[low : low + block, 2] = part.sum(-1)
    statistics[:, 1:2] = logits.gather(1, local.clamp_min(0)).to(wide).masked_fill_(local < 0, 0.0)
    return _combined(shard.gather(statistics))


def _combined(gathered: Tensor) -> Tensor:
    """Statistics of whole rows from those of every shard; [ranks, rows, n] becomes [rows, n]."""
    return torch.cat((gathered[..., :1].logsumexp(0), gathered[..., 1:].sum(0)), -1)


def _shard_rows(
    logits: Tensor, target: Tensor, statistics: Tensor, terms: Terms, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """A shard's gradient in the logits' dtype, and [loss, z part of it], from whole rows' `statistics`.

    Shapes:  logits [rows, vocab/ranks]; target [rows, 1]; statistics [rows, 2 or 3]
    """
    valid = (target != IGNORE_INDEX).to(statistics.dtype)
    is_known = (valid == 0) | ((target >= 0) & (target < shard.vocab_size))
    lse, target_logit = statistics[:, :1], statistics[:, 1:2].where(is_known, torch.nan)
    mean = statistics[:, 2:] / shard.vocab_size if terms.label_smoothing else None
    at_target, sums = _row_terms(valid, lse, target_logit, mean, terms)
    wide = (logits.to(statistics.dtype) - lse).exp_().mul_(_factor(valid, lse, terms))
    if terms.label_smoothing:
        share = valid * (terms.label_smoothing / shard.vocab_size)
        wide -= share
        at_target -= share
    gradient = wide.to(logits.dtype)
    local = _local(target, shard, logits.shape[1])
    place = local.clamp_min(0)
    held = gradient.gather(1, place)
    _put(gradient, place, at_target.to(logits.dtype).where(local >= 0, held))
    return gradient, sums
