"""The model's operations as functions, one to a file.

Every operation has a plain torch reference that also runs in float64 and a training
implementation; `impl` (or MEGALITE_KERNELS) chooses between implementations. The package needs
torch alone and knows nothing of the trainer.
"""

from megalite_kernels.adamw import adamw_
from megalite_kernels.attention import attention, doc_starts_of
from megalite_kernels.cross_entropy import VocabShard, cross_entropy_
from megalite_kernels.dropout import dropout
from megalite_kernels.embedding import embedding
from megalite_kernels.linear_cross_entropy import linear_cross_entropy
from megalite_kernels.mlp import activation_backward, gelu, linear_activation, mlp, swiglu
from megalite_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite_kernels.rope import rope, rope_qkv
from megalite_kernels.sum_of_squares import sum_of_squares

__all__ = [
    "VocabShard",
    "activation_backward",
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy_",
    "doc_starts_of",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear_activation",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rope",
    "rope_qkv",
    "sum_of_squares",
    "swiglu",
]
