"""The shapes that `parallel_cpu.py` compares on, and megalite's own ways of dividing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from workers import Step

from megalite.config import ModelConfig
from megalite.model.transformer import Part, Transformer
from megalite.parallel.mesh import ALONE, Axis, Mesh, MeshShape, build_mesh
from megalite_kernels import linear_cross_entropy


class Shape(NamedTuple):
    """A Llama-shaped model and its batch: `batch` samples for each data-parallel rank, or for all others."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    seq: int
    precision: str = "fp32"

    @property
    def model(self) -> ModelConfig:
        """As our own model has it."""
        return ModelConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            ffn_size=self.ffn,
        )

    def data(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and labels, the same for every contender; [batch, seq] int64 each."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocab, (self.batch, self.seq + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# Most contenders compute with our own model, so the more samples, the more alike they are.
SHAPES = {
    256: Shape(hidden=256, layers=4, heads=4, ffn=704, vocab=4096, batch=4, seq=256),
    1024: Shape(hidden=1024, layers=2, heads=8, ffn=2816, vocab=4096, batch=4, seq=256),
}
LR, CLIP = 1e-3, 1.0


class TrainedTransformer(Transformer):
    """Our model as wrappers want theirs: `forward` gives the mean loss, and all parameters are drawn."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.model)
        draw(self)

    @property
    def layers(self) -> list[nn.Module]:
        """Its blocks."""
        return list(self.blocks.values())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """The loss; all in one forward, so that hooks around it see every use of a parameter."""
        hidden = super().forward(tokens).flatten(0, 1)
        total, _ = linear_cross_entropy(hidden, self.output_weight, labels.flatten())
        return total / labels.numel()


def draw(module: nn.Module, seed: int = 0) -> None:
    """Values for every parameter: ones for vectors, which are norms, normal ones for matrices."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Torch's AdamW in its fused form, with the settings that our engine has by default."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": 0.1 if decays else 0.0}
            for decays, members in groups.items()
            if members
        ],
        lr=LR,
        betas=(0.9, 0.95),
        fused=True,
    )


def engine_step(
    shape: Shape, zero: int = 0, tp: int = 1, sequence: bool = False, alone: bool = False
) -> Step:
    """A step of the native engine; the loss a token of this rank's batch, None where a peer reports it.

    With `alone` each rank trains a whole model of its own beside the others.
    """
    import numpy as np

    from megalite.config_file import build_config
    from megalite.data.batch import Batch
    from megalite.engines.native import NativeEngine
    from megalite.optim.buckets import OwnedRange
    from megalite.parallel.collectives import all_reduce

    mesh = Mesh(0, 1, ALONE, torch.device("cpu")) if alone else build_mesh(shape=MeshShape(tp))
    config = build_config(
        {
            "model": shape.model.model_dump(exclude_none=True),
            "mesh": {"zero_stage": zero, "tp": tp, "sequence_parallel": sequence},
            "data": {"seq_len": shape.seq},
            "optim": {"lr": LR},
            "train": {
                "steps": 1,
                "global_batch_size": shape.batch * mesh.dp.size,
                "micro_batch_size": shape.batch,
                "precision": shape.precision,
            },
        }
    )
    engine = NativeEngine(config, mesh)
    whole = dict(TrainedTransformer(shape).named_parameters())

    def values(owned: OwnedRange) -> Tensor:
        return whole[owned.name].detach().flatten()[owned.start : owned.stop]

    engine.optimizer.fill("weight", values)  # the values that the peers start from
    engine.optimizer.weights.publish()
    tokens, labels = (ids.numpy() for ids in shape.data(seed=mesh.dp.rank))
    positions = np.broadcast_to(np.arange(shape.seq), tokens.shape).copy()
    edges = np.arange(0, tokens.size + 1, shape.seq, dtype=np.int32)
    batch = Batch(tokens, labels, positions, None, np.arange(shape.batch), edges)

    def step() -> float | None:
        sums = engine.forward_backward([batch])
        squared = torch.tensor(sums.grad_norm_squared, dtype=torch.float64)
        norm = float(all_reduce(squared, mesh.world).sqrt())
        engine.optimizer_step(LR, min(1.0, CLIP / norm))
        return sums.loss / sums.tokens if sums.tokens else None

    return step


# --- pipeline ------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """A rank's layers of our model: what both pipeline executors run."""

    def __init__(self, shape: Shape, axis: Axis) -> None:
        super().__init__()
        per_stage = shape.layers // axis.size
        self.layers = range(axis.rank * per_stage, (axis.rank + 1) * per_stage)
        self.shape = shape
        self.is_first, self.is_last = axis.rank == 0, axis.rank == axis.size - 1
        self.part = Transformer(shape.model, part=Part(self.layers, self.is_first, self.is_last))
        draw(self, seed=axis.rank)
        self.positions = torch.arange(shape.seq)[None]
        self.shared = self.part.share((1, shape.seq), self.positions, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [1, seq] on the first stage, else [seq, hidden]; returns [seq, hidden]."""
        if self.is_first:
            x = self.part.embed(x, self.positions, self.shared)
        return self.part.run_blocks(x, self.layers, self.shared)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """This micro-batch's share of the mean loss; x [seq, hidden], labels [1, seq]."""
        losses = self.part.stream_loss(x, labels, z_loss=0.0, chunk_bytes=None)
        return losses.total / (self.shape.batch * self.shape.seq)


def stage_shape(shape: Shape) -> Shape:
    """With as many samples as fill a pipeline: micro-batches are of one sample each."""
    return shape._replace(batch=8 * shape.batch)


def clip(parameters: list[nn.Parameter], mesh: Mesh) -> None:
    """Clip by the norm over the parameters of all ranks, of which none are shared."""
    import torch.distributed as dist

    grads = [p.grad for p in parameters if p.grad is not None]
    squared = nn.utils.get_total_norm(grads).square()
    dist.all_reduce(squared, group=mesh.world.group)
    nn.utils.clip_grads_with_norm_(parameters, CLIP, squared.sqrt())


def pipeline_step(shape: Shape) -> Step:
    """1F1B by our executor; the loss, None on all ranks but the last."""
    from megalite.parallel.pipeline import Pipeline, build_programs
    from megalite.parallel.schedule import build_schedule

    mesh = build_mesh()
    shape = stage_shape(shape)
    stage = Stage(shape, mesh.world)
    tokens, labels = shape.data()
    program = build_programs(build_schedule("1f1b", mesh.size, shape.batch))[mesh.rank]

    def forward(_stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        y: Tensor = stage(tokens[micro_batch : micro_batch + 1] if x is None else x)
        return stage.loss(y, labels[micro_batch : micro_batch + 1]) if stage.is_last else y

    pipeline = Pipeline([forward], mesh.world, mesh.device)

    def losses() -> list[Tensor]:
        return pipeline.run(program, (shape.seq, shape.hidden), torch.float32)

    return stage_step(stage, mesh, losses)


def stage_step(stage: Stage, mesh: Mesh, losses: Callable[[], list[Tensor]]) -> Step:
    """What both executors have around them: clipping and torch's AdamW on the stage's parameters."""
    parameters = list(stage.parameters())
    optimizer = adamw(parameters)

    def step() -> float | None:
        found = losses()
        clip(parameters, mesh)
        optimizer.step()
        optimizer.zero_grad()
        return sum(map(float, found)) if found else None

    return step
