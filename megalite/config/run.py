"""The sections that say how a run goes: mesh, optim, train, checkpoint, resilience, log."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import Section


class MeshConfig(Section):
    """How the work is divided among processes. `dp` is derived: their number divided by `tp` · `pp`."""

    tp: int = Field(1, ge=1, description="processes that share each layer; keep them on one host")
    sequence_parallel: bool = Field(
        False, description="divide norms and residual stream among the tp processes too; saves memory"
    )
    pp: int = Field(1, ge=1, description="pipeline stages, each with a part of the layers")
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="order of the micro-batches; see `megalite plan --draw`"
    )
    pp_chunks: int = Field(1, ge=1, description="interleaved: stages a process holds")
    pp_layers: tuple[int, ...] = Field(
        (), strict=False, description="layers of each stage, pp · pp_chunks of them; [] divides evenly"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what dp shares out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights"
    )
    zero_shard_size: int = Field(
        0, ge=0, description="dp processes that share one model's state, the rest replicate; 0 means all"
    )
    bucket_mib: float = Field(
        8.0, gt=0, lt=2**40, description="gradient bucket, MiB of fp32; one collective each"
    )
    zero_engine: Literal["native", "deepspeed"] = Field(
        "native", description="who runs ZeRO: megalite, or DeepSpeed (pip install megalite[deepspeed])"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="deepspeed: where optimizer state lies, at stage 3 the weights too"
    )
    nvme_path: str = Field("", description="deepspeed: folder on a fast local disk for offload=nvme")


class OptimConfig(Section):
    """AdamW with decoupled weight decay, and the learning rate's course."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate / peak")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="course after warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak")
    decay_steps: int = Field(0, ge=0, description="wsd: length of the final linear decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; none on norms and biases")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 never clips")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f'decay_steps={self.decay_steps} with schedule="{self.schedule}"; '
                'set decay_steps > 0 with "wsd" and 0 otherwise'
            )
        return self


class TrainConfig(Section):
    """The loop: how long, in what batches, at which precision."""

    # The limits keep the number of samples of a run below 2⁶³.
    steps: int = Field(gt=0, lt=2**31, description="optimizer steps of the whole run")
    global_batch_size: int = Field(gt=0, lt=2**31, description="samples a step, over all processes")
    micro_batch_size: int = Field(gt=0, description="samples a process computes at once")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="of the compute; master weights are fp32"
    )
    loss_scale: float = Field(
        65536.0,
        ge=1,
        lt=2**64,
        description="fp16: the first loss scale, halved whenever a gradient overflows",
    )
    loss_scale_window: int = Field(1000, gt=0, description="fp16: doubled after so many steps without")
    compile: bool = Field(False, description="torch.compile each block")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in backward: none, all but GEMMs and attention, whole blocks",
    )
    loss_chunk_mib: float | None = Field(
        None,
        gt=0,
        lt=2**40,
        description="MiB of logits that exist at once, over tp; by default 1024 on a GPU, on CPU 16",
    )
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-partition (PaLM: 1e-4)")
    eval_every_steps: int = Field(0, ge=0, description="validate every n steps and at the end; 0 never")
    eval_samples: int = Field(64, gt=0, description="validation samples, the same each time")

    @property
    def loss_chunk_bytes(self) -> int | None:
        """`loss_chunk_mib` in bytes."""
        return None if self.loss_chunk_mib is None else int(self.loss_chunk_mib * 2**20)


class CheckpointConfig(Section):
    """When the run is saved. Checkpoints lie in run_dir/checkpoints."""

    every_steps: int = Field(1000, ge=0, description="save every n steps and at the end; 0 only at the end")
    asynchronous: bool = Field(True, description="copy the state and write it while training goes on")
    keep_last: int = Field(3, ge=1, description="checkpoints kept, the newest")
    keep_every: int = Field(0, ge=0, description="of older ones, keep those at multiples of n steps; 0 none")
    keep_best: int = Field(0, ge=0, description="and the n of lowest validation loss")
    snapshot_every_steps: int = Field(
        125, ge=0, description="copy the state to host memory every n steps, for a rollback; 0 never"
    )
    snapshots_kept: int = Field(2, ge=1, description="such copies kept; each takes 12 bytes a parameter")


class ResilienceConfig(Section):
    """What a run survives by itself."""

    spike_threshold: float = Field(
        25.0, ge=0, description="deviations (MAD) above the median at which a step is refused; 0 never"
    )
    slow_divergence: float = Field(
        0.1, ge=0, description="relative rise of the loss over its best that ends in a rollback; 0 never"
    )
    rerun_steps: bool = Field(
        True, description="compute a refused step again, to tell a fault of the hardware from one of the data"
    )
    rewind_steps: int | None = Field(
        None, ge=0, description="steps before a spike to go back at least; 100, less in short runs"
    )
    skip_steps: int | None = Field(
        None, gt=0, lt=2**31, description="batches around a spike left out; 200, less in short runs"
    )
    calm_lr_factor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="times the learning rate from a rollback until calm_steps after the spike",
    )
    calm_steps: int = Field(0, ge=0, description="steps after a spike with calm_lr_factor")
    max_rollbacks: int = Field(20, ge=0, description="in a run before exit 77; 0 never goes back")
    max_rollbacks_per_1000: int = Field(3, ge=1, description="rollbacks within 1000 steps before exit 77")
    max_skipped_steps: int = Field(10, ge=0, description="steps refused in a row before exit 77")
    comm_timeout_s: float = Field(
        600.0, gt=0, le=1e8, description="a collective slower than this ends the run (exit 76; nccl aborts)"
    )
    mtbf_hours: float = Field(
        50_000.0, gt=0, description="mean hours between failures of one process (and its share of the host)"
    )
    hang_timeout_s: float = Field(
        60.0, gt=0, description="a step slower than this and than 10 median ones ends the run (exit 76)"
    )
    straggler_every_steps: int = Field(
        10, ge=0, description="compare the ranks' computing times every n steps; 0 never"
    )
    digest_every_steps: int = Field(
        100, ge=0, description="compare replicated weights every n steps and before each save; 0 only before"
    )


class LogConfig(Section):
    """What is printed. metrics.jsonl always gets every step."""

    every_steps: int = Field(10, gt=0, description="console line every n steps when there is no terminal")
