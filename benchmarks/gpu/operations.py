"""Makes workloads: inputs like a training step's, on one device and in one dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as ops
from benchmarks.gpu import peers
from benchmarks.gpu.workloads import Workload
from megalite_kernels.adamw import adamw_reference
from megalite_kernels.adamw import cost as adamw_cost
from megalite_kernels.attention import attention_cost, attention_reference
from megalite_kernels.cost import Cost
from megalite_kernels.cross_entropy import Terms, cross_entropy_reference
from megalite_kernels.cross_entropy import cost as cross_entropy_cost
from megalite_kernels.dropout import cost as dropout_cost
from megalite_kernels.dropout import dropout_reference
from megalite_kernels.embedding import cost as embedding_cost
from megalite_kernels.embedding import embedding_reference
from megalite_kernels.linear_cross_entropy import cost as linear_cross_entropy_cost
from megalite_kernels.mlp import (
    Activation,
    activation_backward_cost,
    activation_backward_reference,
    activation_cost,
    activation_reference,
    linear_activation_cost,
    linear_activation_reference,
)
from megalite_kernels.norm import layer_norm_reference, norm_cost, rms_norm_reference
from megalite_kernels.rope import rope_cost, rope_reference
from megalite_kernels.sum_of_squares import cost as sum_of_squares_cost

_EPS = 1e-5
_ADAM: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 10,
}


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

    def rope(self, batch: int, seq: int, heads: int, kv_heads: int, dim: int) -> Workload:
        """Queries and keys of a packed projection, at once."""

        def inputs() -> list[Tensor]:
            angles = torch.arange(seq, device=self.device)[:, None] / 1e4 ** torch.linspace(
                0, 1, dim // 2, device=self.device
            )
            qkv = self._normal(batch, seq, heads + 2 * kv_heads, dim)
            return [qkv, angles.cos()[None], angles.sin()[None]]

        def reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
            return rope_reference(q, cos, sin), rope_reference(k, cos, sin), v

        def cost(qkv: Tensor, *_: Tensor) -> tuple[Cost, ...]:
            return (rope_cost(batch * seq, heads + kv_heads, dim, qkv.dtype),) * 2

        return Workload(
            self._name("rope_qkv", f"d{dim}", f"{batch}x{seq}x{heads}:{kv_heads}"),
            inputs,
            lambda impl, qkv, cos, sin: ops.rope_qkv(qkv, cos, sin, heads, kv_heads, impl=impl),
            reference,
            cost,
            constant=(1, 2),
            peers=peers.rope(heads, kv_heads) | {"compiled": peers.compiled(reference)},
        )

    def activation(self, tokens: int, ffn: int, activation: Activation) -> Workload:
        """Elementwise, from the pre-activation."""
        parts = 2 if activation == "swiglu" else 1

        def run(impl: Any, pre: Tensor) -> Tensor:
            if activation == "swiglu":
                return ops.swiglu(pre, impl=impl)
            return ops.gelu(pre, tanh=activation == "gelu_tanh", impl=impl)

        def reference(pre: Tensor) -> Tensor:
            return activation_reference(pre, activation)

        return Workload(
            self._name(activation, f"{tokens}x{ffn}"),
            lambda: [self._normal(tokens, parts * ffn)],
            run,
            reference,
            lambda x: _both_ways(activation_cost, tokens, ffn, x.dtype, activation=activation),
            peers=(peers.swiglu() if activation == "swiglu" else {})
            | {"compiled": peers.compiled(reference)},
        )

    def mlp(self, tokens: int, hidden: int, ffn: int, activation: Activation) -> Iterator[Workload]:
        """The two GEMMs that may have the activation in their epilogue; they know no autograd."""
        width = (2 if activation == "swiglu" else 1) * ffn
        sizes = f"{tokens}x{hidden}x{ffn}"

        def up(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return linear_activation_reference(x, weight, activation=activation)

        def down(dy: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
            return activation_backward_reference(dy, weight, pre, activation=activation)

        yield Workload(
            self._name(f"linear_activation/{activation}", sizes),
            lambda: [self._normal(tokens, hidden), self._normal(width, hidden, scale=hidden**-0.5)],
            lambda impl, *x: ops.linear_activation(*x, activation=activation, impl=impl),
            up,
            lambda x, *_: (linear_activation_cost(tokens, hidden, ffn, x.dtype, activation=activation),),
            directions=("forward",),
            peers={"compiled": peers.compiled(up)},
        )
        yield Workload(
            self._name(f"activation_backward/{activation}", sizes),
            lambda: [
                self._normal(tokens, hidden),
                self._normal(ffn, hidden, scale=hidden**-0.5),
                self._normal(tokens, width),
            ],
            lambda impl, *x: ops.activation_backward(*x, activation=activation, impl=impl),
            down,
            lambda dy, *_: (activation_backward_cost(tokens, hidden, ffn, dy.dtype, activation=activation),),
            directions=("forward",),
            rows=(0, 2),
            peers={"compiled": peers.compiled(down)},
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
            | {
                "compiled": peers.compiled(lambda x, targets: cross_entropy_reference(x, targets, Terms())[0])
            },
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

    def embedding(self, tokens: int, vocab: int, hidden: int) -> Workload:
        """Rows of a table; ids as unequally frequent as words."""
        return Workload(
            self._name("embedding", f"{tokens}x{vocab}x{hidden}"),
            lambda: [self._words(tokens, vocab), self._normal(vocab, hidden)],
            lambda impl, ids, weight: ops.embedding(ids, weight, impl=impl),
            embedding_reference,
            lambda ids, weight: embedding_cost(tokens, vocab, hidden, weight.element_size()),
            peers=peers.embedding(),
        )

    def dropout(self, rows: int, width: int) -> Workload:
        """With a key for each row."""
        return Workload(
            self._name("dropout", f"{rows}x{width}"),
            lambda: [self._normal(rows, width), torch.arange(rows, device=self.device)],
            lambda impl, x, keys: ops.dropout(x, 0.1, keys, impl=impl),
            lambda x, keys: dropout_reference(x, 0.1, keys),
            lambda x, _: (dropout_cost(rows * width, x.element_size()),) * 2,
            rows=(0, 1),
            peers={"F.dropout": lambda: lambda x, _: F.dropout(x, 0.1)},
        )

    def adamw(self, size: int) -> Workload:
        """A step over a flat shard with fp32 gradients, the rounded weights written too."""

        def inputs() -> list[Tensor]:
            weight, grad, mean, square = (self._normal(size, dtype=torch.float32) for _ in range(4))
            return [
                weight,
                grad,
                mean,
                square.square_(),
                torch.empty(size, dtype=self.dtype, device=self.device),
            ]

        def run(impl: Any, *state: Tensor) -> tuple[Tensor, ...]:
            weight, grad, mean, square, rounded = state
            ops.adamw_(weight, grad, mean, square, **_ADAM, grad_scale=0.5, rounded=rounded, impl=impl)
            return weight, mean, square, rounded

        def reference(*state: Tensor) -> tuple[Tensor, ...]:
            weight, mean, square = adamw_reference(*state[:4], **_ADAM, grad_scale=0.5)
            return weight, mean, square, weight.to(state[4].dtype)

        return Workload(
            self._name("adamw", size),
            inputs,
            run,
            reference,
            lambda *state: (adamw_cost(size, rounded_bytes=state[4].element_size()),),
            directions=("forward",),
            rows=(0, 1, 2, 3, 4),
            overwritten=(0, 1, 2, 3, 4),
        )

    def sum_of_squares(self, size: int) -> Workload:
        """Of a flat fp32 gradient."""
        return Workload(
            self._name("sum_of_squares", size),
            lambda: [self._normal(size, dtype=torch.float32)],
            lambda impl, x: ops.sum_of_squares(x, impl=impl),
            lambda x: x.square().sum(),
            lambda x: (sum_of_squares_cost(size),),
            directions=("forward",),
            rows=(),
            peers={"vector_norm": lambda: torch.linalg.vector_norm},
        )

    def _words(self, tokens: int, vocab: int) -> Tensor:
        uniform = torch.rand(tokens, dtype=torch.float64, device=self.device)
        return (float(vocab) ** uniform).long().clamp_max(vocab) - 1  # Zipf's law

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
