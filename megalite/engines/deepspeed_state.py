"""Where DeepSpeed keeps a rank's share of weights, moments and gradients. All its internals are touched here.

Stages 1 and 2 flatten each optimizer group and cut it into one range a rank, wherever that falls; stage 3
cuts each parameter. Either way a rank's share is ranges of its parameters, which this module lists, reads
and writes without communication.

Written against deepspeed 0.19.8: `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`,
`runtime/bf16_optimizer.py` and `utils/tensor_fragment.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Partition:
    """Elements [start, stop) of this rank's part of a parameter, flattened, whose state this rank keeps."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int


class DeepSpeedState(Protocol):
    """This rank's share of a model's state. `kind` is "weight", "exp_avg" or "exp_avg_sq"."""

    partitions: list[Partition]

    def read(self, kind: str, partition: Partition) -> Tensor:
        """The fp32 values of a partition [stop - start]."""

    def write(self, kind: str, partition: Partition, values: Tensor) -> None:
        """Set a partition's values; weights take effect with `publish`."""

    def gradient(self, partition: Partition) -> Tensor:
        """The reduced gradient [stop - start], after the last micro-batch's backward."""

    def forget_gradients(self) -> None:
        """Begin a step as after the last one that was applied."""

    def publish(self) -> None:
        """Round the master weights into the compute weights, on all ranks together."""

    def set_step_count(self, count: int) -> None:
        """Set AdamW's t, the steps taken."""

    def arm(self, lr: float, grad_scale: float) -> None:
        """Have the next step use this learning rate, and gradients times `grad_scale`."""


def open_state(engine: Any, parameters: dict[str, nn.Parameter]) -> DeepSpeedState:
    """The state of an engine just made, with its moments allocated, zero.

    `parameters` are the model's, in its order, under our names.
    """
    if engine.zero_optimization_stage() == 3:
        return _CutParameters(engine, parameters)
    return _CutGroups(engine, parameters)


class _Optimizer:
    """What the stages share: torch's AdamW underneath, whose parameters are flat fp32 masters."""

    def __init__(self, engine: Any) -> None:
        self.wrapper = engine.optimizer
        self.adamw = engine.basic_optimizer

    def set_step_count(self, count: int) -> None:
        """See `DeepSpeedState`."""
        for state in self.adamw.state.values():
            state["step"].fill_(count)

    def arm(self, lr: float, grad_scale: float) -> None:
        """See `DeepSpeedState`."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # The fused kernel divides by this attribute, which torch's gradient scaler sets in the same way.
        self.adamw.grad_scale = torch.tensor(1 / grad_scale)

    def _allocate_moments(self, master: Tensor) -> None:
        moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        self.adamw.state[master] = {"step": step, **moments}


class _CutGroups(_Optimizer):
    """Stages 1 and 2, and the optimizer that deepspeed uses for bf16 at stage 1."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(engine)
        self.masters = [group["params"][0] for group in self.adamw.param_groups]
        for master in self.masters:
            self._allocate_moments(master)
        self.partitions = []
        for name, parameter in parameters.items():
            found = parameter._hp_mapping  # type: ignore[attr-defined]
            if found is not None:
                address = found.lp_fragment_address
                self.partitions.append(
                    Partition(name, parameter, address.start, address.start + address.numel)
                )

    def read(self, kind: str, partition: Partition) -> Tensor:
        """See `DeepSpeedState`."""
        master = self.masters[self._mapping(partition).param_group_index]
        return self._cut(partition, master.detach() if kind == "weight" else self.adamw.state[master][kind])

    def write(self, kind: str, partition: Partition, values: Tensor) -> None:
        """See `DeepSpeedState`."""
        self.read(kind, partition).copy_(values)

    def gradient(self, partition: Partition) -> Tensor:
        """See `DeepSpeedState`."""
        group = self._mapping(partition).param_group_index
        if hasattr(self.wrapper, "fp32_groups_gradient_flat_partition"):
            return self._cut(partition, self.wrapper.fp32_groups_gradient_flat_partition[group])
        if self.wrapper.cpu_offload:
            return self._cut(partition, self.masters[group].grad)
        place = partition.parameter._index_in_param_group  # type: ignore[attr-defined]
        gradient: Tensor = self.wrapper.averaged_gradients[group][place]
        return gradient.reshape(-1)

    def forget_gradients(self) -> None:
        """See `DeepSpeedState`. What deepspeed itself does after an overflow."""
        wrapper = self.wrapper
        wrapper.zero_grad(set_to_none=True)
        if hasattr(wrapper, "fp32_groups_gradient_flat_partition"):
            return
        wrapper.micro_step_id = -1
        if wrapper.cpu_offload:
            wrapper.reset_cpu_buffers()
        for group in wrapper.averaged_gradients:
            wrapper.averaged_gradients[group] = None
            wrapper.all_grad_tensors[group] = None

    def publish(self) -> None:
        """See `DeepSpeedState`."""
        self.wrapper.update_lp_params()

    @staticmethod
    def _mapping(partition: Partition) -> Any:
        return partition.parameter._hp_mapping  # type: ignore[attr-defined]

    def _cut(self, partition: Partition, flat: Tensor) -> Tensor:
        address = self._mapping(partition).hp_fragment_address
        return flat.view(-1).narrow(0, address.start, address.numel)


class _CutParameters(_Optimizer):
    """Stage 3. State that lies on disk is brought in and out by each access."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(engine)
        import deepspeed.utils as access

        self.access: Any = access
        for index, master in enumerate(self.wrapper.fp32_partitioned_groups_flat):
            with _Here(self.wrapper, index):
                self._allocate_moments(master)
        self.partitions = []
        rank = engine.mpu.get_data_parallel_rank()
        for name, parameter in parameters.items():
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            stop = min(size * (rank + 1), parameter.ds_numel)  # type: ignore[attr-defined]
            if size * rank < stop:
                self.partitions.append(Partition(name, parameter, size * rank, stop))

    def read(self, kind: str, partition: Partition) -> Tensor:
        """See `DeepSpeedState`."""
        if kind == "weight":
            values = self.access.safe_get_local_fp32_param(partition.parameter)
        else:
            values = self.access.safe_get_local_optimizer_state(partition.parameter, kind)
        return self._trimmed(partition, values)

    def write(self, kind: str, partition: Partition, values: Tensor) -> None:
        """See `DeepSpeedState`."""
        padded = torch.zeros(partition.parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded[: values.numel()] = values
        if kind == "weight":
            self.access.safe_set_local_fp32_param(partition.parameter, padded)
        else:
            self.access.safe_set_local_optimizer_state(partition.parameter, padded, kind)

    def gradient(self, partition: Partition) -> Tensor:
        """See `DeepSpeedState`."""
        return self._trimmed(partition, self.access.safe_get_local_grad(partition.parameter))

    def forget_gradients(self) -> None:
        """See `DeepSpeedState`. The first micro-batch overwrites, once deepspeed counts from zero again."""
        self.wrapper.zero_grad(set_to_none=True)
        if self.wrapper.offload_optimizer:
            self.wrapper.reset_cpu_buffers()

    def publish(self) -> None:
        """See `DeepSpeedState`. As at the end of deepspeed's own step."""
        wrapper = self.wrapper
        wrapper._partition_all_parameters()
        for index in range(len(wrapper.fp16_groups)):
            with _Here(wrapper, index):
                wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    def _trimmed(self, partition: Partition, values: Tensor) -> Tensor:
        """Without padding; copied where the next access would take its storage."""
        values = values.detach()[: partition.stop - partition.start]
        return values.clone() if self.wrapper.swap_optimizer else values


class _Here:
    """While inside, a group of stage 3's state is in memory, wherever it lies otherwise."""

    def __init__(self, wrapper: Any, index: int) -> None:
        self.wrapper, self.index = wrapper, index
        self.moves = wrapper._swappable_optimizer_subgroup(index)

    def __enter__(self) -> None:
        if self.moves:
            self.wrapper._optimizer_states_and_gradient_swap_in(self.index)

    def __exit__(self, *error: object) -> None:
        if self.moves:
            self.wrapper._optimizer_states_and_gradient_swap_out(self.index)
