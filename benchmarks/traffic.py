"""Bytes a rank sends in a step: counted where c10d is called, and the least each way of dividing needs.

A collective counts for what its best algorithm has a rank of n send, S being the bytes of the whole
tensor (Patarasuk and Yuan 2009; Thakur et al. 2005, section 4):

    all-gather, reduce-scatter, all-to-all, reduce, broadcast    S · (n - 1)/n  (the last two on average)
    all-reduce                                                   2 S · (n - 1)/n
    send                                                         S

So the count tells what a program asks for; what a backend then puts on the wire may be more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WORD = 4  # bytes of an fp32 number

_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "send": "send",
}
_SILENT = {
    "recv_",
    "recv_any_source_",
    "barrier",
    "wait_tensor",
    "_wrap_tensor_autograd",
    "monitored_barrier_",
}


class Traffic(TorchDispatchMode):
    """While it is current, counts the bytes this rank sends, by the kind of collective.

    Sees every call that torch dispatches to a process group, from Python or C++, functional or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> Fraction:
        """Bytes sent, of all kinds."""
        return sum(self.sent.values(), Fraction())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count a collective, and perform whatever it is."""
        if any(
            issubclass(kind, Tensor) and kind.__module__.startswith("torch.distributed") for kind in types
        ):
            return NotImplemented  # a DTensor first becomes what it does to its local tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        kind = _COLLECTIVES[name]
        n = _group_size(args)
        largest = max(_bytes(arg) for arg in args[:2] if isinstance(arg, Tensor | list | tuple))
        if name == "all_gather_into_tensor":  # the functional one is given this rank's part only
            largest *= n
        share = {"send": Fraction(1), "all_reduce": 2 * Fraction(n - 1, n)}
        self.sent[kind] += share.get(kind, Fraction(n - 1, n)) * largest
        self.calls[kind] += 1


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of a list of them however deep."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _group_size(args: tuple[Any, ...]) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    names = [arg for arg in args if isinstance(arg, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1]).size()


# --- the least -----------------------------------------------------------------------------------------


def padded(parameters: int, n: int) -> int:
    """Elements of a bucket of so many, cut into n equal shards."""
    return -(-parameters // n) * n


def zero_0_or_1(buckets: list[int], n: int) -> Fraction:
    """All-reduce the gradients, or reduce-scatter them and all-gather the weights: 2 P · (n - 1)/n words.

    Source:  Rajbhandari et al. 2020 (ZeRO), section 7.1
    """
    return 2 * Fraction(n - 1, n) * WORD * sum(buckets)


def zero_2(buckets: list[int], n: int, micro_batches: int) -> Fraction:
    """Each micro-batch's gradients are scattered, the weights gathered once: (m + 1) P · (n - 1)/n words.

    Source:  Rajbhandari et al. 2020 (ZeRO), section 7.1, with m = 1
    """
    return (micro_batches + 1) * Fraction(n - 1, n) * WORD * sum(buckets)


def zero_3(blocks: list[int], root: int, vectors: int, n: int, micro_batches: int) -> Fraction:
    """A micro-batch scatters its gradients and gathers the matrices twice: at most 3 m P · (n - 1)/n words.

    Less than that, as the last block is kept from its forward to its backward, embedding and head (`root`)
    are not needed in backward at all, and norms and biases (`vectors`) are gathered once a step.

    Source:  Rajbhandari et al. 2020 (ZeRO), section 7.2
    """
    scattered = sum(blocks) + root + vectors
    gathered = sum(blocks) + root + sum(blocks[:-1])
    words = micro_batches * (scattered + gathered) + vectors
    return Fraction(n - 1, n) * WORD * words


def tensor_parallel_activations(layers: int, hidden: int, tokens: int, n: int, sequence: bool) -> Fraction:
    """One micro-batch's activations and their gradients; X is tokens · hidden words.

    Whole stream: all-reduces of X, two a layer forward and two backward, one for the embedding, one for the
    gradient of the head's input: (4 L + 2) · 2 X · (n - 1)/n. Divided tokens: each is a reduce-scatter and an
    all-gather of the same bytes, and the column-parallel layers gather their inputs again in backward, two a
    layer: (10 L + 4) · X · (n - 1)/n, where 2 of the 4 are the embedding's and 2 the head's. The loss
    gathers two numbers a token from each rank.

    Source:  Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2
    """
    units = 10 * layers + 4 if sequence else 2 * (4 * layers + 2)
    return Fraction(n - 1, n) * WORD * (units * tokens * hidden + n * 2 * tokens)


def norm_gradients(layers: int, hidden: int, n: int) -> Fraction:
    """Where tokens are divided each rank has a share of the 2 L + 1 norms' gradients; once a step."""
    return 2 * Fraction(n - 1, n) * WORD * (2 * layers + 1) * hidden


def pipeline(rank: int, pp: int, hidden: int, tokens: int, micro_batches: int) -> Fraction:
    """A stage sends each micro-batch's output upwards and its input's gradient downwards.

    Source:  Narayanan et al. 2021, section 3.2
    """
    directions = (rank < pp - 1) + (rank > 0)
    return Fraction(directions * micro_batches * tokens * hidden * WORD)


def mib(sent: Fraction) -> float:
    """Bytes as MiB, rounded for a table."""
    return round(float(sent) / 2**20, 3)
