"""What a DeepSpeed ZeRO checkpoint holds, whole tensor by whole tensor, whatever number of ranks and stage wrote it, and how
a run of another number or stage goes on from it.

DeepSpeed's own ways join the fp32 weights and Adam's moments alone, all at once or by writing them anew (its universal
format). Here every kind of state is joined, the moving average of the weights among them, one parameter at a time, from
files that are mapped and not read: a rank never holds more than one whole parameter, and nothing is converted first.
"""

import importlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i.optimizer import AVERAGE

MODEL_STATES = "*_model_states.pt"
OPTIMIZER_STATES = "*_optim_states.pt"


def load_saved(path: Path, mapped: bool = True) -> Any:
    """What DeepSpeed saved in a file, with no objects in it but tensors, plain values and DeepSpeed's own. `mapped`: tensors
    are read from the file as they are used."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if foreign := [name for name in names if not name.startswith("deepspeed.")]:
        raise ValueError(
            f"{path} holds {', '.join(foreign)}, which no run of this program saves; use another checkpoint"
        )
    modules = [name.rpartition(".") for name in names]
    allowed = [getattr(importlib.import_module(module), name) for module, _, name in modules]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)


class SavedStates:
    """Weights and optimizer state of one checkpoint folder. Raises ValueError where files are missing or not DeepSpeed's."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        shards = [self._one(f"*zero_pp_rank_{rank}_mp_rank_00{OPTIMIZER_STATES[1:]}") for rank in range(ranks)]
        self._optimizers = [load_saved(path)["optimizer_state_dict"] for path in shards]
        model = sorted(folder.glob(MODEL_STATES))
        if not model:
            raise ValueError(f"{folder} has lost its {MODEL_STATES}; go on from another checkpoint")
        self._model = load_saved(model[0])
        self._three = "fp32_flat_groups" in self._optimizers[0]
        groups = self._model["param_shapes"]
        self.shapes: dict[str, torch.Size] = {name: shape for group in groups for name, shape in group.items()}
        """Shape of each trained parameter, by name."""
        self._group_of = {name: number for number, group in enumerate(groups) for name in group}

    def _one(self, pattern: str) -> Path:
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise ValueError(
                f"{self.folder} has {len(found)} files {pattern} and needs one; go on from another checkpoint"
            )
        return found[0]

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken, for their gradients were no numbers."""
        return int(self._model["skipped_steps"])

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's own object, which a run in fp16 goes on with."""
        return self._optimizers[0]["loss_scaler"]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors of the model that are not trained."""
        return {name: self._model["module"][name] for name in self._model["buffer_names"]}

    def adam_step(self) -> float:
        """How many steps the optimizer has taken; 0 before the first."""
        steps = [float(state["step"]) for state in self._states(0).values() if "step" in state]
        assert len(set(steps)) <= 1, f"{self.folder} has parameters of different ages: {sorted(set(steps))}"
        return steps[0] if steps else 0.0

    def has(self, kind: str) -> bool:
        """Whether the optimizer has this kind of state ("exp_avg", "exp_avg_sq", "ema")."""
        states = self._states(0).values()
        return bool(states) and all(kind in state for state in states)

    def tensor(self, name: str, kind: str | None = None) -> Tensor:
        """A parameter's fp32 weights or, by `kind`, its optimizer state, of the parameter's shape."""
        shape = self.shapes[name]
        parts = self._parts_of_stage_3(name, kind) if self._three else self._parts(name, kind)
        flat = torch.cat(parts)
        assert len(flat) >= shape.numel(), f"{self.folder}: {name} has {len(flat)} of {shape.numel()} numbers"
        return flat[: shape.numel()].view(shape)

    def state_dict(self, kind: str | None = None) -> dict[str, Tensor]:
        """All weights, or states of a kind, by parameter name, and the buffers with them."""
        return {name: self.tensor(name, kind) for name in self.shapes} | self.buffers

    def _states(self, rank: int) -> dict[int, dict[str, Tensor]]:
        saved = self._optimizers[rank]
        states: dict[int, dict[str, Tensor]] = saved["optimizer_state_dict" if self._three else "base_optimizer_state"][
            "state"
        ]
        return states

    def _flat(self, rank: int, group: int, kind: str | None) -> Tensor:
        """One rank's share of a group: weights, or optimizer state."""
        if kind is not None:
            return self._states(rank)[group][kind]
        saved = self._optimizers[rank]
        flat: Tensor = saved["fp32_flat_groups" if self._three else "single_partition_of_fp32_groups"][group]
        return flat

    # Stages 1 and 2: the parameters of a group, one after the other, are cut into as many pieces as there are ranks.

    def _parts(self, name: str, kind: str | None) -> list[Tensor]:
        group, parts = self._group_of[name], []
        for rank, saved in enumerate(self._optimizers):
            if (address := saved["param_slice_mappings"][group].get(name)) is not None:
                parts.append(self._flat(rank, group, kind)[address.start : address.start + address.numel])
        return parts

    # Stage 3: every parameter is cut into as many pieces as there are ranks, and a rank has its piece of each, in order.

    @cached_property
    def _starts(self) -> dict[str, int]:
        starts, start = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = start
            start += math.ceil(shape.numel() / len(self._optimizers))
        return starts

    def _parts_of_stage_3(self, name: str, kind: str | None) -> list[Tensor]:
        """Pieces of all ranks, padding behind the last; a rank's groups follow each other."""
        first = self._starts[name]
        last = first + math.ceil(self.shapes[name].numel() / len(self._optimizers))
        parts = []
        for rank, saved in enumerate(self._optimizers):
            start = 0
            for group, weights in enumerate(saved["fp32_flat_groups"]):
                end = start + weights.numel()
                if first < end and start < last:
                    parts.append(self._flat(rank, group, kind)[max(first - start, 0) : last - start])
                start = end
        return parts


KINDS = ("exp_avg", "exp_avg_sq", AVERAGE)
"""Optimizer state that has the shape of its parameter."""


@torch.no_grad()
def restore(engine: Any, rank: int, saved: SavedStates) -> None:
    """Give a DeepSpeed engine of any stage the weights and optimizer state of a checkpoint of any other arrangement.

    Every rank reads what it has a part of; nothing is sent between them. Raises ValueError where the model's parameters are
    not those of the checkpoint.
    """
    parameters = dict(engine.module.named_parameters())
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    if shapes != saved.shapes:
        differ = sorted(name for name in shapes.keys() | saved.shapes if shapes.get(name) != saved.shapes.get(name))
        raise ValueError(
            f"{saved.folder} is of another model: {', '.join(differ[:8])} differ; choose another --run-dir"
        )
    kinds = [kind for kind in KINDS if saved.has(kind)]
    optimizer = engine.optimizer
    three = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats = optimizer.fp32_partitioned_groups_flat if three else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        step = torch.tensor(saved.adam_step(), device=flat.device)
        # What is behind the last parameter is padding.
        optimizer.optimizer.state[flat] = {"step": step} | {kind: torch.zeros_like(flat) for kind in kinds}
        assert flat.dtype == torch.float32, flat.dtype
    place = _place_of_stage_3(optimizer, rank) if three else _place(optimizer)
    for name, parameter in parameters.items():
        group, start, first, length = place(parameter)
        for kind in (None, *kinds):
            value = saved.tensor(name, kind).flatten()
            if kind is None and not three:
                parameter.copy_(value.view(parameter.shape))
            part = value[first : first + length]
            target = flats[group] if kind is None else optimizer.optimizer.state[flats[group]][kind]
            target[start : start + len(part)] = part.to(target.device)
            if kind is None and three:
                parameter.ds_tensor[: len(part)] = part.to(parameter.ds_tensor)
                if parameter.data.numel() == parameter.ds_numel:  # a small one, whole on every rank
                    parameter.data.copy_(value.view(parameter.ds_shape))
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
    if engine.fp16_enabled():
        optimizer.loss_scaler = saved.loss_scaler
    engine.skipped_steps = saved.skipped_steps


Place = Callable[[nn.Parameter], tuple[int, int, int, int]]
"""Where this rank's part of a parameter is: its group, start in the group's flat tensor, start in the parameter, length."""


def _place(optimizer: Any) -> Place:
    groups = {id(p): number for number, group in enumerate(optimizer.bit16_groups) for p in group}

    def place(parameter: nn.Parameter) -> tuple[int, int, int, int]:
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # all of it is on other ranks
            return groups[id(parameter)], 0, 0, 0
        flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        return groups[id(parameter)], flat.start, own.start, own.numel

    return place


def _place_of_stage_3(optimizer: Any, rank: int) -> Place:
    def place(parameter: nn.Parameter) -> tuple[int, int, int, int]:
        group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return int(group), int(start), rank * int(length), int(length)

    return place
