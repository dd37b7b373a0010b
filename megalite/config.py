"""The configuration of a run, as frozen models that check themselves.

Keys follow Hugging Face's meaning where one exists. Keys that contradict each other are refused
with both values, and derived numbers are properties, so no value lives in two places.
`config_file.py` reads and writes it.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megalite.errors import ConfigError


class Section(BaseModel):
    """A frozen TOML table that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RopeScaling(Section):
    """How RoPE frequencies are stretched beyond the length a model was trained for."""

    type: Literal["linear", "llama3"] = Field(description="linear, or Llama 3's by wavelength")
    factor: float = Field(gt=0, description="how many times longer the context becomes")
    low_freq_factor: float = Field(
        1.0, gt=0, description="llama3: waves longer than original/low are stretched"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="llama3: waves shorter than original/high are kept"
    )
    original_seq_len: int = Field(8192, gt=0, description="llama3: sequence length before stretching")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """A decoder-only transformer; enough to express GPT-2, Llama, Mistral, Qwen2 and Qwen3 exactly."""

    vocab_size: int = Field(gt=1, description="rows of the embedding; at least the tokenizer's vocabulary")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    num_layers: int = Field(gt=0, description="transformer blocks")
    num_heads: int = Field(gt=0, description="query heads")
    num_kv_heads: int = Field(0, ge=0, description="key/value heads (GQA); 0 means num_heads")
    head_dim: int = Field(0, ge=0, description="width of a head; 0 means hidden_size / num_heads")
    ffn_size: int = Field(gt=0, description="inner width of the MLP")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field("swiglu", description="MLP activation")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation layer")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance")
    position: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table")
    max_seq_len: int = Field(8192, gt=0, description="longest position; rows of a learned table")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base")
    rope_scaling: RopeScaling | None = Field(None, description="stretching of RoPE frequencies")
    qkv_bias: bool = Field(False, description="biases on the query, key and value projections")
    attention_out_bias: bool = Field(False, description="bias on the attention output projection")
    mlp_bias: bool = Field(False, description="biases on the MLP projections")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head (Qwen3)")
    sliding_window: int = Field(0, ge=0, description="keys a query sees, itself included; 0 means all")
    tie_embeddings: bool = Field(False, description="share the input embedding with the output head")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="on embeddings and both residual branches; reproducible"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    scale_residual_init: bool = Field(
        True, description="divide init_std by sqrt(2·num_layers) on residual outputs"
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            heads, hidden = values.get("num_heads"), values.get("hidden_size")
            if not values.get("num_kv_heads") and isinstance(heads, int):
                values["num_kv_heads"] = heads
            if (
                not values.get("head_dim")
                and isinstance(heads, int)
                and isinstance(hidden, int)
                and heads > 0
            ):
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size={hidden} is not a multiple of num_heads={heads}; set head_dim"
                    )
                values["head_dim"] = hidden // heads
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; use {legal}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for RoPE")
        if self.position == "learned" and self.rope_scaling is not None:
            raise ValueError('rope_scaling has no meaning with position="learned"; remove one')
        return self


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
    bucket_mib: float = Field(8.0, gt=0, description="gradient bucket, MiB of fp32; one collective each")
    zero_engine: Literal["native", "deepspeed"] = Field(
        "native", description="who runs ZeRO: megalite, or DeepSpeed (pip install megalite[deepspeed])"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="deepspeed: where optimizer state lies, at stage 3 the weights too"
    )
    nvme_path: str = Field("", description="deepspeed: folder on a fast local disk for offload=nvme")


class Source(Section):
    """One dataset folder (or a parent of its shards) and its share of the mixture."""

    path: str = Field(description="folder holding a manifest.json")
    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="share of samples, relative to the other sources"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="passes over it at most; then the other sources share what it had"
    )


class MixtureChange(Section):
    """Other shares from a token count on: weights, or a temperature."""

    tokens: int = Field(ge=0, description="tokens read before the change")
    weights: tuple[float, ...] = Field((), strict=False, description="one for each of data.sources")
    temperature: float | None = Field(None, gt=0, description="instead of weights, see data.temperature")


class SeqLenChange(Section):
    """Another row length from a token count on."""

    tokens: int = Field(ge=0, description="tokens read before the change")
    seq_len: int = Field(gt=0, description="tokens a row; divides data.seq_len")


class DataConfig(Section):
    """What is read, and in which shape it reaches the model."""

    sources: tuple[Source, ...] = Field(
        (), strict=False, description="training datasets: [{path, weight, max_epochs}]"
    )
    validation: tuple[Source, ...] = Field(
        (), strict=False, description="held-out datasets: [{path, weight}]"
    )
    temperature: float | None = Field(
        None, gt=0, description="T: shares in proportion to tokens^(1/T) in place of weights"
    )
    schedule: tuple[MixtureChange, ...] = Field(
        (), strict=False, description="later shares: [{tokens, weights}] or [{tokens, temperature}]"
    )
    seq_len: int = Field(gt=0, description="tokens a sample")
    seq_len_schedule: tuple[SeqLenChange, ...] = Field(
        (), strict=False, description="samples cut into shorter rows: [{tokens, seq_len}]"
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="documents end to end and cut, or packed whole with padding"
    )
    document_mask: bool = Field(
        True, description="attention stays within a document, positions restart at each"
    )
    shuffle: bool = Field(True, description="permute samples, anew each epoch; false reads in stored order")
    shuffle_chunks: int = Field(
        48, gt=0, description="chunks of neighbouring samples shuffled together; more mix better, open more"
    )
    skip: tuple[Annotated[tuple[int, int], Field(strict=False)], ...] = Field(
        (), strict=False, description="ranges of global sample indices left out: [[first, after], ...]"
    )
    prefetch: int = Field(2, ge=0, description="steps read ahead by a thread")
    max_bad_blocks: float = Field(
        0.001, ge=0, le=1, description="share of damaged record batches replaced before the run stops"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature is not None and any(source.weight != 1.0 for source in self.sources):
            raise ValueError(f"temperature={self.temperature} with weights in sources; give one of the two")
        for n, change in enumerate(self.schedule):
            key, weights = f"schedule[{n}]", list(change.weights)
            if bool(weights) == (change.temperature is not None):
                raise ValueError(f"{key} needs either weights or a temperature")
            if weights and (len(weights) != len(self.sources) or min(weights) < 0 or not any(weights)):
                raise ValueError(
                    f"{key}.weights={weights}; give {len(self.sources)} numbers, one for each of sources, "
                    "none negative and not all 0"
                )
        for n, stage in enumerate(self.seq_len_schedule):
            if self.seq_len % stage.seq_len:
                raise ValueError(
                    f"seq_len_schedule[{n}].seq_len={stage.seq_len} does not divide seq_len={self.seq_len}; "
                    f"use one of {_divisors(self.seq_len)}"
                )
        for name, changes in (("schedule", self.schedule), ("seq_len_schedule", self.seq_len_schedule)):
            counts = [change.tokens for change in changes]
            if counts != sorted(set(counts)):
                raise ValueError(f"{name} has tokens {counts}; each change comes after the one before")
        return self

    @property
    def held_out(self) -> Self:
        """The same for the validation datasets: in stored order, end to end, nothing replaced."""
        plain = {"temperature": None, "schedule": (), "seq_len_schedule": (), "packing": "concat", "skip": ()}
        rest = {"sources": self.validation, "validation": (), "shuffle": False, "max_bad_blocks": 0.0}
        return self.model_copy(update=plain | rest)


class OptimConfig(Section):
    """AdamW with decoupled weight decay, and the learning rate's course."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate / peak")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="course after warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0 to the peak")
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

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    global_batch_size: int = Field(gt=0, description="samples a step, over all processes")
    micro_batch_size: int = Field(gt=0, description="samples a process computes at once")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="of the compute; master weights are fp32"
    )
    loss_scale: float = Field(
        65536.0, ge=1, description="fp16: the first loss scale, halved whenever a gradient overflows"
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
        description="MiB of logits that exist at once, over tp; by default 1024 on a GPU, on CPU 32",
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
        None, gt=0, description="batches around a spike left out; 200, less in short runs"
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
        600.0, gt=0, description="a collective slower than this ends the run (exit 76)"
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


class Config(Section):
    """A whole run."""

    run_dir: str = Field("runs/default", description="where config, metrics, ledger and checkpoints go")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order and dropout")
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}; "
                "shorten one or raise the other"
            )
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.train.micro_batch_size} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; use one of "
                f"{_divisors(self.train.global_batch_size)}"
            )
        ramp = self.optim.warmup_steps + self.optim.decay_steps
        if ramp > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps + optim.decay_steps = {ramp} exceeds train.steps={self.train.steps}"
            )
        if self.train.eval_every_steps and not self.data.validation:
            raise ValueError(
                f"train.eval_every_steps={self.train.eval_every_steps} but data.validation is empty; "
                "name a validation dataset or set it to 0"
            )
        if self.checkpoint.keep_best and not self.train.eval_every_steps:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} but train.eval_every_steps=0: nothing "
                "says which is best; validate, at steps that are saved, or set it to 0"
            )
        self._check_tp()
        self._check_pp()
        self._check_zero_engine()
        return self

    def _check_tp(self) -> None:
        """What tensor parallelism divides must divide.

        Raises:  ValueError
        """
        tp, model = self.mesh.tp, self.model
        divided = {"num_heads": model.num_heads, "ffn_size": model.ffn_size}
        if self.mesh.sequence_parallel:
            divided["data.seq_len"] = self.data.seq_len
        legal = [
            n
            for n in range(1, model.num_heads + 1)
            if not any(size % n for size in divided.values())
            and not (model.num_kv_heads % n and n % model.num_kv_heads)
            and n <= model.vocab_size
        ]
        if tp in legal:
            return
        names = [
            f"{key if '.' in key else f'model.{key}'}={size}" for key, size in divided.items() if size % tp
        ]
        if not names:
            names = [f"model.num_kv_heads={model.num_kv_heads}"]
            raise ValueError(
                f"mesh.tp={tp} and {names[0]} must divide one the other; use mesh.tp from {legal}"
            )
        raise ValueError(f"mesh.tp={tp} does not divide {' and '.join(names)}; use mesh.tp from {legal}")

    def _check_pp(self) -> None:
        """A pipeline's stages need layers, and its schedule the right number of chunks.

        Raises:  ValueError
        """
        mesh, layers = self.mesh, self.model.num_layers
        stages = mesh.pp * mesh.pp_chunks
        if (mesh.pp_chunks > 1) != (mesh.pp_schedule == "interleaved"):
            raise ValueError(
                f'mesh.pp_chunks={mesh.pp_chunks} with mesh.pp_schedule="{mesh.pp_schedule}"; set '
                'pp_chunks > 1 with "interleaved" and 1 otherwise'
            )
        if stages > layers:
            raise ValueError(
                f"mesh.pp={mesh.pp} × mesh.pp_chunks={mesh.pp_chunks} are more stages than "
                f"model.num_layers={layers}; use at most {layers}"
            )
        if mesh.pp_layers and (
            len(mesh.pp_layers) != stages or sum(mesh.pp_layers) != layers or min(mesh.pp_layers) < 0
        ):
            raise ValueError(
                f"mesh.pp_layers={list(mesh.pp_layers)}; give pp · pp_chunks = {stages} numbers that add up "
                f"to model.num_layers={layers}"
            )
        if mesh.pp_schedule == "zero_bubble" and self.train.compile:
            raise ValueError(
                'mesh.pp_schedule="zero_bubble" splits each backward, which train.compile=true does not '
                'let it; use "1f1b", or train.compile=false'
            )

    @property
    def stage_layers(self) -> list[range]:
        """The layers of each pipeline stage; where they do not divide, the first stages take one more."""
        stages = self.mesh.pp * self.mesh.pp_chunks
        least, more = divmod(self.model.num_layers, stages)
        counts = self.mesh.pp_layers or [least + (stage < more) for stage in range(stages)]
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]

    def _check_zero_engine(self) -> None:
        """What only one of the two ZeRO engines can do.

        Raises:  ValueError
        """
        mesh, train = self.mesh, self.train
        stage, offload = f"mesh.zero_stage={mesh.zero_stage}", f'mesh.offload="{mesh.offload}"'
        ours = 'with mesh.zero_engine="deepspeed"'
        if mesh.zero_engine == "native":
            faults = {
                f'{offload} needs mesh.zero_engine="deepspeed"; use it, or "none"': mesh.offload != "none",
                'mesh.nvme_path needs mesh.zero_engine="deepspeed"; leave it empty': bool(mesh.nvme_path),
            }
        else:
            on_disk, is_selective = mesh.offload == "nvme", train.recompute == "selective"
            faults = {
                f"{stage} {ours}: there is nothing to divide; use 1, 2 or 3": mesh.zero_stage == 0,
                f"mesh.zero_shard_size={mesh.zero_shard_size} {ours}: it divides over all data-parallel "
                "processes; use 0, or the native engine": mesh.zero_shard_size > 0,
                f"mesh.pp={mesh.pp} {ours}: its ZeRO refuses pipelines from stage 2 on; use mesh.pp=1 with a "
                "larger mesh.tp, or the native engine": mesh.pp > 1,
                f"train.compile=true {ours}: its hooks are not proven under the compiler; use false, or the "
                "native engine": train.compile,
                f'train.recompute="selective" with {stage} {ours}: it would have to repeat the gathers of '
                'weights; use "full" or "none", or the native engine': is_selective and mesh.zero_stage == 3,
                f"{stage} with {offload}: DeepSpeed moves state to disk at stage 3 only; use that, or "
                'mesh.offload="cpu"': on_disk and mesh.zero_stage < 3,
                f'mesh.nvme_path="{mesh.nvme_path}" with {offload}: set the path exactly with '
                'mesh.offload="nvme"': on_disk != bool(mesh.nvme_path),
            }
        for fault, is_there in faults.items():
            if is_there:
                raise ValueError(fault)

    def data_parallel_size(self, processes: int) -> int:
        """How many groups of processes each hold a whole model.

        Raises:  ConfigError if the processes do not make whole groups, or those not whole shard groups
        """
        tp, pp = self.mesh.tp, self.mesh.pp
        if processes % (tp * pp):
            raise ConfigError(
                f"mesh.tp={tp} × mesh.pp={pp} does not divide the number of processes, {processes}; start a "
                f"multiple of {tp * pp}, or use a tp · pp from {_divisors(processes)}"
            )
        dp, size = processes // (tp * pp), self.mesh.zero_shard_size
        if size and dp % size:
            raise ConfigError(
                f"mesh.zero_shard_size={size} does not divide the data-parallel size {dp}; use 0 (all) or "
                f"one of {_divisors(dp)}"
            )
        return dp

    @property
    def kv_copies(self) -> int:
        """Tensor-parallel processes that share a key head; 1 while there are heads enough for all."""
        return max(self.mesh.tp // self.model.num_kv_heads, 1)

    def grad_accum_steps(self, dp: int) -> int:
        """Micro-batches a process computes per optimizer step at data-parallel size `dp`.

        Raises:  ConfigError if global_batch_size is not a multiple of micro_batch_size · dp
        """
        train = self.train
        if train.global_batch_size % (train.micro_batch_size * dp):
            if train.global_batch_size % dp:
                remedy = f"make train.global_batch_size a multiple of {dp}"
            else:
                remedy = f"use a micro_batch_size out of {_divisors(train.global_batch_size // dp)}"
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} × {dp} data-parallel processes; {remedy}"
            )
        return train.global_batch_size // (train.micro_batch_size * dp)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch, ignored labels included."""
        return self.train.global_batch_size * self.data.seq_len


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
