"""SwiGLU and GELU: elementwise, and as a part of the MLP's GEMMs.

The MLP saves its input and the pre-activation alone. Its hidden layer, of ffn columns, is formed again
in backward, beside the pre-activation's gradient, where both operands are at hand.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, resolve

Activation = Literal["swiglu", "gelu", "gelu_tanh"]
_CPU_ROWS = 256  # on CPU so many rows at a time go through backward's passes, near a core's cache


def swiglu(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """SiLU of the gate half times the up half.

    y = g · sigmoid(g) · u  with (g, u) the halves of the last dimension. Backward recomputes the
    activation from `gate_up`, so nothing else is saved.

    Shapes:  gate_up [..., 2 · ffn]; returns [..., ffn]
    Source:  Shazeer 2020, eq. 5
    """
    return _elementwise(gate_up, "swiglu", impl)


def gelu(x: Tensor, *, tanh: bool = False, impl: Impl = "auto") -> Tensor:
    """x · Φ(x), or with `tanh` GPT-2's approximation of it.

    Shapes:  x [...]; returns x's shape
    Source:  Hendrycks and Gimpel 2016, eq. 2 and section 2
    """
    return _elementwise(x, "gelu_tanh" if tanh else "gelu", impl)


def _elementwise(pre: Tensor, activation: Activation, impl: Impl) -> Tensor:
    chosen = resolve(impl, "activation", pre, activation)
    if chosen == "reference":
        return activation_reference(pre, activation)
    if chosen == "triton":
        from megalite_kernels.gpu.activation import activation as kernel

        result: Tensor = kernel(pre, activation)
        return result
    y: Tensor = _Activation.apply(pre, activation)  # type: ignore[no-untyped-call]
    return y


def activation_reference(pre: Tensor, activation: Activation) -> Tensor:
    """`swiglu` and `gelu` as their formulas read."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return gate * gate.sigmoid() * up
    if activation == "gelu":
        twice_share: Tensor = 1 + torch.special.erf(pre / 2**0.5)
    else:
        twice_share = 1 + ((2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)).tanh()
    return 0.5 * pre * twice_share


def _gradient(d_hidden: Tensor, pre: Tensor, activation: Activation) -> Tensor:
    """The pre-activation's gradient as its formula reads."""
    slope: Tensor
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        s = gate.sigmoid()
        slope = s * (1 + gate * (1 - s))
        return torch.cat((d_hidden * up * slope, d_hidden * gate * s), -1)
    if activation == "gelu":
        below = 0.5 * (1 + torch.special.erf(pre / 2**0.5))
        slope = below + pre * torch.exp(-(pre**2) / 2) / (2 * torch.pi) ** 0.5
    else:
        factor = (2 / torch.pi) ** 0.5
        tanh = (factor * (pre + 0.044715 * pre**3)).tanh()
        inner_slope = factor * (1 + 3 * 0.044715 * pre**2)
        slope = 0.5 * (1 + tanh + pre * (1 - tanh**2) * inner_slope)
    return d_hidden * slope


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(pre)
        ctx.activation = activation
        return _activate(pre, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (pre,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _gradient(grads[0], pre, ctx.activation), None
        d_pre = torch.empty_like(pre, memory_format=torch.contiguous_format)
        _activate_backward(grads[0], pre, d_pre, ctx.activation)
        return d_pre, None


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The MLP's first half: pre = x·Wᵀ + b and hidden = act(pre), of pre as it is stored.

    "triton" is one GEMM with the activation in its epilogue; "torch" a GEMM and then the activation, as
    the choice for "activation" has it. Knows no autograd: `mlp` shows how the two halves are joined.

    Shapes:  x [tokens, hidden]; weight [ffn, hidden], for swiglu [2 · ffn, hidden] with the gate's rows
             before the up rows; bias [weight's rows]; returns hidden [tokens, ffn] and pre
             [tokens, weight's rows]
    """
    chosen = resolve(impl, "mlp", x, f"linear_activation/{activation}")
    if chosen == "reference":
        return linear_activation_reference(x, weight, bias, activation=activation)
    hidden: Tensor
    if chosen == "triton":
        from megalite_kernels.gpu.mlp import linear_activation as gemm

        hidden = x.new_empty(x.shape[0], weight.shape[0] // _parts(activation))
        return hidden, gemm(x, weight, bias, hidden, activation)
    pre = F.linear(x, weight, bias)
    if resolve(impl, "activation", pre, activation) == "triton":
        from megalite_kernels.gpu.activation import activation as kernel

        hidden = kernel(pre, activation)
        return hidden, pre
    return _activate(pre, activation), pre


def linear_activation_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation
) -> tuple[Tensor, Tensor]:
    """`linear_activation` as its formula reads."""
    pre = x @ weight.T
    if bias is not None:
        pre = pre + bias
    return activation_reference(pre, activation), pre


def activation_backward(
    dy: Tensor, weight: Tensor, pre: Tensor, *, activation: Activation, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradient of the pre-activation, and hidden formed again, for the gradient of `weight`.

    With d_hidden = dy·Wᵀ for a second half y = hidden·W:  d_pre = d_hidden · act'(pre). "triton" has the
    rest in the epilogue of that GEMM; "torch" does it afterwards, as the choice for "activation" has it.

    Shapes:  dy [tokens, hidden_size]; weight [ffn, hidden_size]; pre as `linear_activation` returned
             it; returns d_pre [pre's] and hidden [tokens, ffn]
    """
    chosen = resolve(impl, "mlp", dy, f"activation_backward/{activation}")
    if chosen == "reference":
        return activation_backward_reference(dy, weight, pre, activation=activation)
    if chosen == "triton":
        from megalite_kernels.gpu.mlp import activation_backward as gemm

        d_pre, hidden = gemm(dy, weight, pre, activation)
        return d_pre, hidden
    if resolve(impl, "activation", pre, activation) == "triton":
        from megalite_kernels.gpu.activation import activation_backward_again as kernel

        d_pre, hidden = kernel(dy @ weight.T, pre, activation)
        return d_pre, hidden
    if torch.compiler.is_compiling():  # fuses formulas, and makes detours of writes to parts of a tensor
        return activation_backward_reference(dy, weight, pre, activation=activation)
    # d_hidden is written to where d_pre will be: no memory beyond the results.
    d_pre = torch.empty_like(pre, memory_format=torch.contiguous_format)
    d_hidden = d_pre[:, : weight.shape[0]].addmm_(dy, weight.T, beta=0)
    hidden = dy.new_empty(pre.shape[0], weight.shape[0])
    block = _CPU_ROWS if pre.device.type == "cpu" else max(pre.shape[0], 1)
    for low in range(0, pre.shape[0], block):
        rows = slice(low, low + block)
        _activate_backward(d_hidden[rows], pre[rows], d_pre[rows], activation, hidden[rows])
    return d_pre, hidden


def activation_backward_reference(
    dy: Tensor, weight: Tensor, pre: Tensor, *, activation: Activation
) -> tuple[Tensor, Tensor]:
    """`activation_backward` as its formula reads."""
    return _gradient(dy @ weight.T, pre, activation), activation_reference(pre, activation)


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *, activation: Activation, impl: Impl = "auto") -> Tensor:
    """y = act(x·W_upᵀ)·W_down, differentiable; of the activations x and pre alone are saved.

    Shapes:  x [tokens, hidden]; w_up [ffn, hidden], for swiglu [2 · ffn, hidden] with the gate's rows
             before the up rows; w_down [ffn, hidden]; returns [tokens, hidden]
    """
    if impl == "reference":
        return linear_activation_reference(x, w_up, activation=activation)[0] @ w_down
    y: Tensor = _MLP.apply(x, w_up, w_down, activation, impl)  # type: ignore[no-untyped-call]
    return y


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_up: Tensor, w_down: Tensor, activation: Activation, impl: Impl
    ) -> Tensor:
        hidden, pre = linear_activation(x, w_up, activation=activation, impl=impl)
        ctx.save_for_backward(x, pre, w_up, w_down)
        ctx.activation, ctx.impl = activation, impl
        return hidden @ w_down

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, w_up, w_down = ctx.saved_tensors
        d_pre, hidden = activation_backward(grads[0], w_down, pre, activation=ctx.activation, impl=ctx.impl)
        dw_down = hidden.T @ grads[0]
        del hidden
        return d_pre @ w_up, d_pre.T @ x, dw_down, None, None


# --- in torch --------------------------------------------------------------------------------------


def _activate(pre: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        y = F.silu(gate).mul_(up)
        return y.view_as(y)  # compiled, torch 2.11 gives zeros for the gradient of what was written in place
    return F.gelu(pre, approximate=_approximation(activation))


def _activate_backward(
    d_hidden: Tensor, pre: Tensor, d_pre: Tensor, activation: Activation, hidden: Tensor | None = None
) -> None:
    """Write d_pre, and act(pre) to `hidden` if it is there.

    d_hidden may lie where d_pre has its first ffn columns.
    """
    aten = torch.ops.aten
    if activation != "swiglu":
        how = {"approximate": _approximation(activation)}
        aten.gelu_backward.grad_input(d_hidden, pre, **how, grad_input=d_pre)
        if hidden is not None:
            aten.gelu.out(pre, **how, out=hidden)
        return
    (gate, up), (d_gate, d_up) = pre.chunk(2, dim=-1), d_pre.chunk(2, dim=-1)
    activated = F.silu(gate) if hidden is None else aten.silu.out(gate, out=hidden)
    torch.mul(activated, d_hidden, out=d_up)
    torch.mul(d_hidden, up, out=d_gate)
    aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    if hidden is not None:
        hidden.mul_(up)


def _approximation(activation: Activation) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


# --- costs -----------------------------------------------------------------------------------------


def activation_cost(
    tokens: int, ffn: int, dtype: torch.dtype, *, activation: Activation, is_backward: bool = False
) -> Cost:
    """Least work of `swiglu` or `gelu`: forward reads pre and writes hidden; backward reads hidden's
    gradient and pre, and writes pre's gradient. Some ten flops an element."""
    parts = _parts(activation)
    passes = 1 + 2 * parts if is_backward else 1 + parts
    return Cost(10 * tokens * ffn, tokens * ffn * passes * dtype.itemsize)


def linear_activation_cost(
    tokens: int, hidden: int, ffn: int, dtype: torch.dtype, *, activation: Activation
) -> Cost:
    """Least work of `linear_activation`: the GEMM's flops; x and weight read, pre and hidden written."""
    width = _parts(activation) * ffn
    elements = tokens * hidden + width * hidden + tokens * (width + ffn)
    return Cost(2 * tokens * hidden * width, elements * dtype.itemsize)


def activation_backward_cost(
    tokens: int, hidden: int, ffn: int, dtype: torch.dtype, *, activation: Activation
) -> Cost:
    """Least work of `activation_backward`: the GEMM's flops; dy, weight and pre read, d_pre and hidden
    written."""
    width = _parts(activation) * ffn
    elements = tokens * hidden + ffn * hidden + tokens * (2 * width + ffn)
    return Cost(2 * tokens * hidden * ffn, elements * dtype.itemsize)


def _parts(activation: Activation) -> int:
    """Columns of the pre-activation for one of hidden."""
    return 2 if activation == "swiglu" else 1
