"""The decoder-only transformer: embedding, blocks, final norm, and the loss on top.

One set of modules expresses GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen3; `ModelConfig` says
which. Arithmetic lives in `megalite_kernels`, initial values in `init.py`; nothing here knows how
parameters are stored or gradients reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megalite.config import ModelConfig
from megalite.model.attention import Attention, KVCache, rotation
from megalite.model.mlp import MLP
from megalite_kernels import dropout, embedding, layer_norm, linear_cross_entropy, rms_norm
from megalite_kernels.counter import derive_key, fold

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Losses:
    """Sums over the labels that are not ignored; 0-dim tensors.

    `total` is what is differentiated: cross-entropy plus z-loss.
    """

    total: Tensor
    z_loss: Tensor
    tokens: Tensor


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        has_bias = config.norm == "layernorm"
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; x [..., hidden]."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        doc_starts: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x, returned [batch, seq, hidden]; turn from `rotation`; dropout_keys [batch] in training."""
        y = self.attention(self.attention_norm(x), turn, doc_starts, cache)
        x = x + self._drop(y, dropout_keys, 0)
        y = self.mlp(self.mlp_norm(x))
        return x + self._drop(y, dropout_keys, 1)

    def _drop(self, y: Tensor, keys: Tensor | None, branch: int) -> Tensor:
        if keys is None or not self.dropout:
            return y
        return dropout(y, self.dropout, fold(keys, 2 * self.index + branch + 1))


class Transformer(nn.Module):
    """The whole model. Built on the meta device it costs nothing until values are assigned."""

    def __init__(self, config: ModelConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.positions: nn.Parameter | None = None
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(config.max_seq_len, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = Norm(config)
        self.head: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    @property
    def output_weight(self) -> nn.Parameter:
        """The head's [vocab, hidden] matrix: its own, or the embedding when tied."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_starts: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The residual stream after the final norm.

        Shapes:  tokens [batch, seq] int64; positions [batch or 1, seq] int64, 0… by default;
                 doc_starts [batch, seq], see `megalite_kernels.attention`; dropout_keys [batch]
                 int64, one for each sample, turns dropout on; returns [batch, seq, hidden]
        """
        if positions is None:
            past = cache[0].length if cache else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        x = embedding(tokens, self.embedding)
        turn = None
        if self.positions is None:
            turn = rotation(positions, self.config)
        else:
            x = x + embedding(positions, self.positions)
        if dropout_keys is not None and self.config.dropout:
            x = dropout(x, self.config.dropout, fold(dropout_keys, 0))
        for index, block in enumerate(self.blocks):
            args = (x, turn, doc_starts, dropout_keys, cache[index] if cache else None)
            x = self._run(block, args)
        y: Tensor = self.norm(x)
        return y

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        doc_starts: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
        z_loss: float = 0.0,
        chunk_tokens: int = 512,
    ) -> Losses:
        """Summed next-token losses; labels [batch, seq] with -100 where nothing is asked."""
        hidden = self(tokens, positions, doc_starts, dropout_keys=dropout_keys).flatten(0, 1)
        total, z = linear_cross_entropy(
            hidden,
            self.output_weight,
            labels.flatten(),
            z_loss=z_loss,
            chunk_tokens=chunk_tokens,
        )
        return Losses(total, z, (labels != -100).sum())

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token; hidden [..., hidden], returns [..., vocab]."""
        return nn.functional.linear(hidden, self.output_weight)

    def _run(self, block: nn.Module, args: tuple[Any, ...]) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            y: Tensor = block(*args)
        elif self.recompute == "full":
            y = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            y = checkpoint(
                block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
            )
        return y


def dropout_keys(seed: int, sample_ids: Tensor) -> Tensor:
    """The key of each sample's dropout masks: a function of the run's seed and the sample alone."""
    return fold(sample_ids, derive_key("dropout", seed))


def _keep_products() -> Any:
    """Selective recompute: outputs of GEMMs and attention are kept, all else is computed again."""
    products = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.megalite.attention_cpu.default,
    }

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = operation in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
