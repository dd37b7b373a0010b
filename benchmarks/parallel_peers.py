"""What `parallel_cpu.py` compares with: torch's own parallelism, DeepSpeed and Megatron-core.

What wraps a model is given ours, or the one of `transformers`. Tensor parallelism needs the peer's own
layers, so DTensor has a model of torch's layers with our arithmetic between them, and Megatron-core its
GPTModel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from parallel_ours import CLIP, Shape, Stage, TrainedTransformer, adamw, draw, stage_shape, stage_step
from torch import Tensor, nn
from workers import Step

from megalite.model.attention import rotation
from megalite.parallel.mesh import build_mesh
from megalite_kernels import attention, rope, swiglu


class LlamaOfTransformers(nn.Module):
    """The same model by `transformers`, called as `TrainedTransformer` is."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.ffn,
                rms_norm_eps=shape.model.norm_eps,
                use_cache=False,
            )
        )
        draw(self)

    @property
    def layers(self) -> nn.ModuleList:
        """Its blocks."""
        layers: nn.ModuleList = self.llama.model.layers
        return layers

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, as its own loss function forms it."""
        logits = self.llama(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def torch_step(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Step:
    """Backward, torch's clipping and its fused AdamW."""
    optimizer = adamw(parameters)

    def step() -> float:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def ddp_step(shape: Shape, model: nn.Module) -> Step:
    """DistributedDataParallel, in bf16 with autocast."""
    from torch.nn.parallel import DistributedDataParallel

    mesh = build_mesh()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens, labels = shape.data(seed=mesh.rank)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bf16"):
            value: Tensor = wrapped(tokens, labels)
        return value

    return torch_step(loss, list(wrapped.parameters()))


def fsdp_step(shape: Shape, model: LlamaOfTransformers | TrainedTransformer, reshard: bool) -> Step:
    """FSDP2, a group for each block and one for the rest, as its documentation has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = build_mesh()
    policy = MixedPrecisionPolicy()
    if shape.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    devices = init_device_mesh("cpu", (mesh.size,))
    for block in model.layers:
        fully_shard(block, mesh=devices, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=devices, reshard_after_forward=reshard, mp_policy=policy)
    tokens, labels = shape.data(seed=mesh.rank)
    return torch_step(lambda: model(tokens, labels), list(model.parameters()))


def deepspeed_step(shape: Shape, model: nn.Module, stage: int) -> Step:
    """DeepSpeed with its defaults."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    mesh = build_mesh()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": shape.precision == "bf16"},
    }
    optimizer = adamw(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    tokens, labels = shape.data(seed=mesh.rank)

    def step() -> float:
        loss = engine(tokens, labels)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


# --- DTensor -------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """Our block of torch's layers; inside, a rank has its share of the heads."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        super().__init__()
        h, f = shape.hidden, shape.ffn
        self.heads, self.head_dim = shape.heads // ranks, h // shape.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(h, eps=1e-5), nn.RMSNorm(h, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(h, h, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down = nn.Linear(f, h, bias=False)
        # Places where a plan can say how the tokens are divided.
        self.attend, self.mlp = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x, returned [batch, seq, hidden], or a rank's share of the sequence."""
        y = self.attend(self.attention_norm(x))
        q, k, v = (p(y).unflatten(-1, (self.heads, self.head_dim)) for p in (self.q, self.k, self.v))
        x = x + self.o(attention(rope(q, *turn), rope(k, *turn), v).flatten(2))
        y = self.mlp(self.mlp_norm(x))
        return x + self.down(swiglu(torch.cat((self.gate(y), self.up(y)), -1)))


class PlainModel(nn.Module):
    """Our model of torch's layers."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(PlainBlock(shape, ranks) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.turn = rotation(torch.arange(shape.seq)[None], shape.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; tokens [batch, seq]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.turn)
        y: Tensor = self.head(self.norm(x))
        return y


def dtensor_step(shape: Shape, sequence: bool) -> Step:
    """The plan that torch's tutorial has for a Llama, with its parallel loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = build_mesh()
    devices = init_device_mesh("cpu", (mesh.size,))
    model = PlainModel(shape, mesh.size)
    draw(model)
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
        "blocks.*.o": RowwiseParallel(output_layouts=stream),
        "blocks.*.down": RowwiseParallel(output_layouts=stream),
    }
    plan |= {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    # As a DTensor the input meets all its products before its gradient is summed, once.
    enter = PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
    plan |= {"blocks.*.attend": enter, "blocks.*.mlp": enter}
    if sequence:
        norms = ("norm", "blocks.*.attention_norm", "blocks.*.mlp_norm")
        plan |= {name: SequenceParallel(use_local_output=True) for name in norms}
    parallelize_module(model, devices, plan)
    tokens, labels = shape.data()
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = adamw(model.parameters())

    def clip() -> None:
        squared = torch.zeros(())
        for group in (split, whole):
            if group:
                norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
                squared += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        for group in (split, whole):
            nn.utils.clip_grads_with_norm_(group, CLIP, squared.sqrt())

    def step() -> float:
        with loss_parallel():
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)

    return step


# --- Megatron-core -------------------------------------------------------------------------------------


def megatron_step(shape: Shape, sequence: bool) -> Step:
    """Its GPTModel of local layers; two calls that know only CUDA are given their CPU meaning.

    The local norm refuses divided tokens; torch's stands in for it, and the sum of its gradient over the
    ranks, which the trainer around the model does in one message, is done here.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    mesh = build_mesh()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=mesh.size)
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        tensor_model_parallel_size=mesh.size,
        sequence_parallel=sequence,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec: Any = layer
    if sequence:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _TorchNorm
        spec = TransformerBlockSubmodules(layer_specs=[layer] * shape.layers, layer_norm=_TorchNorm)
    model = GPTModel(
        config,
        spec,
        shape.vocab,
        shape.seq,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    draw(model, seed=mesh.rank)
    tokens, labels = shape.data()
    positions = torch.arange(shape.seq).expand(shape.batch, -1)
    mask = torch.ones(1, 1, shape.seq, shape.seq, dtype=torch.bool).triu(1)
    parameters = list(model.parameters())
    copies = [p for p in parameters if p.dim() == 1]
    optimizer = adamw(parameters)

    def clip() -> None:
        grads = [p.grad for p in parameters if p.grad is not None and (p.dim() > 1 or mesh.rank == 0)]
        squared = nn.utils.get_total_norm(grads).square()
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(parameters, CLIP, squared.sqrt())

    def step() -> float:
        loss = model(tokens, positions, mask, labels=labels).mean()
        loss.backward()
        if sequence:
            flat = torch.cat([p.grad for p in copies if p.grad is not None])
            dist.all_reduce(flat)
            for parameter, part in zip(copies, flat.split([p.numel() for p in copies]), strict=True):
                parameter.grad = part
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


class _TorchNorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.RMSNorm:  # type: ignore[misc]
        return nn.RMSNorm(hidden_size, eps=eps)


# --- pipeline ------------------------------------------------------------------------------------------


def torch_pipeline_step(shape: Shape) -> Step:
    """1F1B by torch.distributed.pipelining, on the stages that our executor has."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    mesh = build_mesh()
    shape = stage_shape(shape)
    module = Stage(shape, mesh.world)
    stage = PipelineStage(module, mesh.rank, mesh.size, mesh.device)
    schedule = Schedule1F1B(stage, shape.batch, loss_fn=module.loss, scale_grads=False)
    tokens, labels = shape.data()

    def losses() -> list[Tensor]:
        found: list[Tensor] = []
        if module.is_first:
            schedule.step(tokens)
        elif module.is_last:
            schedule.step(target=labels, losses=found)
        else:
            schedule.step()
        return [loss.detach() for loss in found]

    return stage_step(module, mesh, losses)
