"""The decoder-only transformer: embedding, blocks, final norm, and the loss on top.

One set of modules expresses GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen3; `ModelConfig` says
which. Arithmetic lives in `megalite_kernels`, initial values in `init.py`; nothing here knows how
parameters are stored or gradients reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megalite.config import ModelConfig
from megalite.model.attention import Attention, KVCache, rotation
from megalite.model.mlp import MLP
from megalite.parallel.layers import TensorParallel, enter_tp, vocab_parallel_embedding, vocab_shard
from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.sharding import ShardedModule, across_stages, split
from megalite_kernels import (
    add_layer_norm,
    add_rms_norm,
    dropout,
    embedding,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
)
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


class DropoutRows(NamedTuple):
    """What decides the masks of a run of tokens: each one's sample key, and its place in the sample.

    Shapes:  both [tokens] int64
    """

    keys: Tensor
    places: Tensor


class Norm(ShardedModule):
    """RMSNorm, or LayerNorm with a bias."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = config.norm_eps
        spec = tp.replicated((config.hidden_size,))
        self.weight = self.declare("weight", spec)
        self.bias = self.declare("bias", spec) if config.norm == "layernorm" else None

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add a branch to the stream x, if there is one, and normalise; all [..., hidden].

        Returns the normalised, and the stream that it is of.
        """
        if self.bias is None:
            if branch is None:
                return rms_norm(x, self.weight, self.eps), x
            return add_rms_norm(x, branch, self.weight, self.eps)
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps), x
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    An addition is one operation with the norm that follows it, which for the MLP's branch is the next
    block's: so a block is given, and gives, a stream and a branch that is yet to be added to it.
    """

    def __init__(self, config: ModelConfig, index: int, tp: TensorParallel) -> None:
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.attention_norm = Norm(config, tp)
        self.attention = Attention(config, tp)
        self.mlp_norm = Norm(config, tp)
        self.mlp = MLP(config, tp)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        batch: int,
        turn: tuple[Tensor, Tensor] | None,
        doc_starts: Tensor | None = None,
        noise: DropoutRows | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x and branch, returned both, [tokens, hidden] or a rank's share of the tokens; turn from
        `rotation`."""
        y, x = self.attention_norm(x, branch)
        y = self.attention(y, batch, turn, doc_starts, cache)
        y, x = self.mlp_norm(x, self._drop(y, noise, 0))
        return x, self._drop(self.mlp(y), noise, 1)

    def _drop(self, y: Tensor, noise: DropoutRows | None, branch: int) -> Tensor:
        if noise is None:
            return y
        return dropout(y, self.dropout, fold(noise.keys, 2 * self.index + branch + 1), noise.places)


@dataclass(frozen=True)
class Part:
    """What of a model a pipeline rank holds: some layers, the embedding if first, norm and head if last.

    `ends` are the two ranks that both hold a tied embedding.
    """

    layers: Sequence[int]
    is_first: bool = True
    is_last: bool = True
    ends: Axis = ALONE


class Shared(NamedTuple):
    """What every block needs beside the stream: `turn` from `rotation`, the rest as `forward` takes it."""

    batch: int
    turn: tuple[Tensor, Tensor] | None
    doc_starts: Tensor | None
    noise: DropoutRows | None


class Transformer(ShardedModule):
    """The whole model, or a tensor- or pipeline-parallel rank's part of it, under the whole's names.

    Built on the meta device it costs nothing until values are assigned. Inside, the residual stream is
    [tokens, hidden] with tokens = batch · seq. Attributes of what the part does not hold do not exist.
    """

    embedding: nn.Parameter
    norm: Norm

    def __init__(
        self,
        config: ModelConfig,
        recompute: Recompute = "none",
        tp: TensorParallel | None = None,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.tp = config, recompute, tp or TensorParallel()
        part = part or Part(range(config.num_layers))
        table = split((config.vocab_size, config.hidden_size), self.tp.axis)
        self.first_id = table.pieces[0].start  # of this rank's rows
        is_tied = config.tie_embeddings
        if part.is_first or (part.is_last and is_tied):
            self.embedding = self.declare("embedding", across_stages(table, part.ends) if is_tied else table)
        self.has_positions = config.position == "learned"
        if part.is_first and self.has_positions:
            places = (config.max_seq_len, config.hidden_size)
            self.positions = self.declare("positions", self.tp.replicated(places))
        self.blocks = nn.ModuleDict({str(index): Block(config, index, self.tp) for index in part.layers})
        if part.is_last:
            self.norm = Norm(config, self.tp)
            if not is_tied:
                self.head = self.declare("head", table)

    @property
    def output_weight(self) -> nn.Parameter:
        """The head's [vocab, hidden] matrix, or this rank's rows: its own, or the embedding's when tied."""
        return self.embedding if self.config.tie_embeddings else self.head

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_starts: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The residual stream after the final norm, whole on every rank.

        Shapes:  tokens [batch, seq] int64; positions [batch or 1, seq] int64, 0… by default;
                 doc_starts [batch, seq], see `megalite_kernels.attention`; dropout_keys [batch]
                 int64, one for each sample, turns dropout on; returns [batch, seq, hidden]
        """
        x = self._stream(tokens, positions, doc_starts, dropout_keys, cache)
        return self._finish(x).view(*tokens.shape, -1)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        doc_starts: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
        z_loss: float = 0.0,
        chunk_bytes: int | None = None,
    ) -> Losses:
        """Summed next-token losses; labels [batch, seq] with -100 where nothing is asked."""
        x = self._stream(tokens, positions, doc_starts, dropout_keys)
        return self.stream_loss(x, labels, z_loss, chunk_bytes)

    def _stream(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        doc_starts: Tensor | None,
        dropout_keys: Tensor | None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The stream after the last block."""
        if positions is None:
            past = cache[0].length if cache else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        shared = self.share(tokens.shape, positions, doc_starts, dropout_keys)
        x = self.embed(tokens, positions, shared)
        return self.run_blocks(x, range(self.config.num_layers), shared, cache)

    # --- the same in steps, for pipeline stages -----------------------------------------------------

    def share(
        self,
        shape: tuple[int, ...],
        positions: Tensor,
        doc_starts: Tensor | None,
        dropout_keys: Tensor | None,
    ) -> Shared:
        """What the blocks need for tokens of `shape` (batch, seq); the rest as `forward` has it."""
        batch, seq = shape
        noise = None
        if dropout_keys is not None and self.config.dropout:
            places = torch.arange(seq, device=positions.device).repeat(batch)
            keys = dropout_keys.repeat_interleave(seq)
            noise = DropoutRows(self.tp.token_shard(keys), self.tp.token_shard(places))
        turn = None if self.has_positions else rotation(positions, self.config)
        return Shared(batch, turn, doc_starts, noise)

    def embed(self, tokens: Tensor, positions: Tensor, shared: Shared) -> Tensor:
        """The stream before the first block; tokens [batch, seq], returns [tokens, hidden] or a share."""
        x = vocab_parallel_embedding(tokens.flatten(), self.embedding, self.first_id, self.tp)
        if self.has_positions:
            rows = self.tp.token_shard(positions.expand(tokens.shape).flatten())
            x = x + embedding(rows, self.positions)
        if shared.noise is not None:
            x = dropout(x, self.config.dropout, fold(shared.noise.keys, 0), shared.noise.places)
        return x

    def run_blocks(
        self, x: Tensor, layers: Sequence[int], shared: Shared, cache: list[KVCache] | None = None
    ) -> Tensor:
        """The stream after these layers, which the part must hold."""
        branch = None
        for index in layers:
            if branch is not None and self.recompute == "full":  # then a block's input is what is kept
                x, branch = x + branch, None
            x, branch = self._run(
                self.blocks[str(index)], (x, branch, *shared, cache[index] if cache else None)
            )
        return x if branch is None else x + branch

    def stream_loss(self, x: Tensor, labels: Tensor, z_loss: float, chunk_bytes: int | None) -> Losses:
        """Summed next-token losses of the stream after the last block; labels as `loss` takes them."""
        total, z = linear_cross_entropy(
            self._finish(x),
            self.output_weight,
            labels.flatten(),
            z_loss=z_loss,
            chunk_bytes=chunk_bytes,
            vocab_shard=vocab_shard(self.first_id, self.config.vocab_size, self.tp),
        )
        return Losses(total, z, (labels != -100).sum())

    def _finish(self, x: Tensor) -> Tensor:
        y, _ = self.norm(x)
        whole: Tensor = enter_tp(y, self.tp) if self.tp.axis.size > 1 else y
        return whole

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token; hidden [..., hidden], returns [..., vocab]."""
        return nn.functional.linear(hidden, self.output_weight)

    def _run(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            y: tuple[Tensor, Tensor] = block(*args)
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
    products = {  # by name, for a kernel's operator is there only where that kernel is used
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "megalite::attention",
        "megalite::attention_cpu",
        "megalite::linear_activation",
    }

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = operation.name() in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
