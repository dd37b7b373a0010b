"""Makes workloads: inputs like a training step's, on one device and in one dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import megalite_kernels as ops
from benchmarks.gpu import peers
from benchmarks.gpu.workloads import Workload
from megalite_kernels.attention import attention_cost, attention_reference
from megalite_kernels.cost import Cost
from megalite_kernels.cross_entropy import Terms, cross_entropy_reference
from megalite_kernels.cross_entropy import cost as cross_entropy_cost
from megalite_kernels.linear_cross_entropy import cost as linear_cross_entropy_cost
from megalite_kernels.norm import layer_norm_reference, norm_cost, rms_norm_reference

_EPS = 1e-5
_ADAM: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 10}


@dataclass(frozen=True)
class Maker:
    """One method for each operation; sizes are in the order of the tensors' shapes."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def _normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return drawn.normal_(std=scale)

    def _name(self, operation: str, *parts: object) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return "/".join([operation, kind, *map(str, parts)])

    def attention(
        self,
        batch: int,
        seq: int,
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        causal: bool = True,
        window: int = 0,
        doc_tokens: int = 0,
    ) -> Workload:
        """`doc_tokens` is the mean length of packed documents; 0 means one document."""
        starts = _doc_starts(batch, seq, doc_tokens) if doc_tokens else None
        visible = _visible(batch, seq, starts, causal, window)
        doc_starts = None if starts is None else starts.to(self.device)
        options: dict[str, Any] = {"causal": causal, "window": window, "doc_starts": doc_starts}

        def inputs() -> list[Tensor]:
            heads_of = (heads, kv_heads, kv_heads)
            return [self._normal(batch, seq, count, dim) for count in heads_of]

        def run(impl: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chosen = options if doc_starts is None else {**options, "doc_starts": doc_starts[-q.shape[0] :]}
            return ops.attention(q, k, v, **chosen, impl=impl)

        kind = "causal" if causal else "full"
        kind += f" window {window}" * bool(window) + f" documents {doc_tokens}" * bool(doc_tokens)
        return Workload(
            self._name("attention", f"d{dim}", kind, f"{batch}x{seq}x{heads}:{kv_heads}"),
            inputs,
            run,
            lambda q, k, v: attention_reference(q, k, v, **options, scale=dim**-0.5)[0],
            lambda q, k, v: attention_cost(q, k, causal=causal, visible=visible),
            rows=(0, 1, 2),
            peers=peers.attention(doc_starts, causal, window),
        )

    def norms(self, rows: int, dim: int) -> Iterator[Workload]:
        """Each norm, alone and after a residual addition."""

        def vector(around: float) -> Tensor:
            return around + self._normal(dim, scale=0.1, dtype=torch.float32)

        for is_layer_norm in (False, True):
            weights = (1.0, 0.0) if is_layer_norm else (1.0,)
            name = "layer_norm" if is_layer_norm else "rms_norm"
            reference = layer_norm_reference if is_layer_norm else rms_norm_reference
            norm, add_norm = (getattr(ops, name), getattr(ops, f"add_{name}"))
            yield Workload(
                self._name(name, f"{rows}x{dim}"),
                lambda weights=weights: [self._normal(rows, dim), *map(vector, weights)],  # type: ignore[misc]
                lambda impl, *x, norm=norm: norm(*x, _EPS, impl=impl),
                lambda *x, reference=reference: reference(*x, _EPS),
                lambda x, *_: _both_ways(norm_cost, rows, dim, x.dtype),
                peers=(peers.layer_norm if is_layer_norm else peers.rms_norm)(_EPS)
                | {"compiled": peers.compiled(lambda *x, reference=reference: reference(*x, _EPS))},
            )
            yield Workload(
                self._name(f"add_{name}", f"{rows}x{dim}"),
                lambda weights=weights: [  # type: ignore[misc]
                    *(self._normal(rows, dim) for _ in range(2)),
                    *map(vector, weights),
                ],
                lambda impl, *x, add_norm=add_norm: add_norm(*x, _EPS, impl=impl),
                lambda *x, reference=reference: _added(reference, *x),
                lambda x, *_: _both_ways(norm_cost, rows, dim, x.dtype, is_added=True),
                rows=(0, 1),
                peers=({} if is_layer_norm else peers.add_rms_norm(_EPS))
                | {"compiled": peers.compiled(lambda *x, reference=reference: _added(reference, *x))},
            )

    def cross_entropy(self, rows: int, vocab: int) -> Workload:
        """In place on given logits; every tenth target is ignored."""
        return Workload(
            self._name("cross_entropy", f"{rows}x{vocab}"),
            lambda: [self._normal(rows, vocab, scale=2.0), self._targets(rows, vocab)],
            lambda impl, logits, targets: ops.cross_entropy_(logits, targets, impl=impl)[0],
            lambda logits, targets: cross_entropy_reference(logits, targets, Terms())[0],
            lambda logits, targets: (cross_entropy_cost(rows, vocab, logits.element_size()),),
            directions=("both",),
            rows=(0, 1),
            overwritten=(0,),
            peers=peers.cross_entropy()
            | {"compiled": peers.compiled(lambda x, targets: cross_entropy_reference(x, targets, Terms())[0])},
        )

    def linear_cross_entropy(self, tokens: int, hidden: int, vocab: int) -> Workload:
        """Output projection and loss in one."""

        def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy_reference(x @ weight.t(), targets, Terms())[0]

        return Workload(
            self._name("linear_cross_entropy", f"{tokens}x{hidden}x{vocab}"),
            lambda: [
                self._normal(tokens, hidden),
                self._normal(vocab, hidden, scale=hidden**-0.5),
                self._targets(tokens, vocab),
            ],
            lambda impl, *x: ops.linear_cross_entropy(*x, impl=impl)[0],
            reference,
            lambda x, *_: (linear_cross_entropy_cost(tokens, hidden, vocab, x.element_size()),),
            directions=("both",),
            rows=(),  # a product of other shapes may take another order
            peers=peers.linear_cross_entropy() | {"compiled": peers.compiled(reference)},
        )

    def _targets(self, rows: int, vocab: int) -> Tensor:
        targets = torch.randint(0, vocab, (rows,), device=self.device)
        targets[::10] = -100
        return targets


def _both_ways(cost: Any, *args: Any, **options: Any) -> tuple[Cost, Cost]:
    return cost(*args, **options, is_backward=False), cost(*args, **options, is_backward=True)


def _added(norm: Any, x: Tensor, branch: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + branch
    return norm(stream, *weights, _EPS), stream


def _doc_starts(batch: int, seq: int, mean: int) -> Tensor:
    """Where each token's document starts, lengths drawn with the given mean; int64 [batch, seq]."""
    generator = torch.Generator().manual_seed(3)
    is_first = torch.rand(batch, seq, generator=generator) < 1 / mean
    is_first[:, 0] = True
    return torch.where(is_first, torch.arange(seq), 0).cummax(1).values


def _visible(batch: int, seq: int, starts: Tensor | None, causal: bool, window: int) -> int:
    """Pairs of query and key that see each other, in all rows together."""
    if not causal:
        return batch * seq * seq
    place = torch.arange(seq).expand(batch, seq)
    low = torch.zeros_like(place) if starts is None else starts
    if window:
        low = torch.maximum(low, place - window + 1)
    return int((place - low + 1).sum())
