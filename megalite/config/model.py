"""The `[model]` section."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import Section


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

    # The limits keep the number of elements of every parameter, and its bytes, below 2⁶³, and a place in a
    # sequence in an int32.
    vocab_size: int = Field(
        gt=1, lt=2**31, description="rows of the embedding; at least the tokenizer's vocabulary"
    )
    hidden_size: int = Field(gt=0, lt=2**24, description="width of the residual stream")
    num_layers: int = Field(gt=0, lt=2**16, description="transformer blocks")
    num_heads: int = Field(gt=0, lt=2**16, description="query heads")
    num_kv_heads: int = Field(0, ge=0, description="key/value heads (GQA); 0 means num_heads")
    head_dim: int = Field(0, ge=0, lt=2**16, description="width of a head; 0 means hidden_size / num_heads")
    ffn_size: int = Field(gt=0, lt=2**28, description="inner width of the MLP")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field("swiglu", description="MLP activation")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation layer")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance")
    position: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table")
    max_seq_len: int = Field(8192, gt=0, lt=2**31, description="longest position; rows of a learned table")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base")
    rope_scaling: RopeScaling | None = Field(None, description="stretching of RoPE frequencies")
    qkv_bias: bool = Field(False, description="biases on the query, key and value projections")
    attention_out_bias: bool = Field(False, description="bias on the attention output projection")
    mlp_bias: bool = Field(False, description="biases on the MLP projections")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head (Qwen3)")
    sliding_window: int = Field(
        0, ge=0, lt=2**31, description="keys a query sees, itself included; 0 means all"
    )
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
