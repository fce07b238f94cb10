"""DeepSpeed and torch.distributed, behind the few calls that the training loop makes.

One of the three modules that know either, with `t2i.monitor` and `t2i.doctor.probe`; the loop, the model and the data know
ranks only as numbers.
"""

import datetime
import difflib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from t2i.costs import checkpoint_bytes
from t2i.threads import cores_per_rank
from t2i.zero_shards import SavedStates, restore

_FIELDS = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "zero_optimization", "bf16", "fp16",
    "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "activation_checkpointing", "prescale_gradients",
    "communication_data_type", "data_types", "wall_clock_breakdown", "steps_per_print", "comms_logger", "checkpoint",
)  # fmt: skip
"""What a DeepSpeed JSON for training has at its top level, as far as it is likely to be written here."""

GROUP_TIMEOUT = 600.0  # seconds
FOR_EVER = 30 * 86400.0


@dataclass(frozen=True)
class Runtime:
    """Which process this is, of how many, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_runtime(timeout: float = GROUP_TIMEOUT) -> Runtime:
    """Join the process group of the launcher, or make one of a single process where none launched this one; a collective
    waits `timeout` seconds for the slowest rank."""
    # DeepSpeed looks for mpi4py when these are missing.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Its shared-memory all-reduce would be compiled at every first start, and leaves files in /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(cores_per_rank())
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # ZeRO makes groups of its own, which take the default timeout, not the one given to init_distributed.
    limit = dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=timeout)
    deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=limit, verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ["LOCAL_RANK"])
    name = accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu"
    if name != "cpu":
        accelerator.set_device(local_rank)
    return Runtime(rank, ranks, torch.device(name))


def stop_runtime() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON, checked for what would fail later or be overruled in silence.

    Raises ValueError with the field and what to write.
    """
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"DeepSpeed configuration {path} cannot be read ({error.strerror}); see deepspeed_configs/"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"DeepSpeed configuration {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed configuration {path} is not a JSON object; see deepspeed_configs/")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(f"{path} has a {name!r} section, which the recipe owns (train.lr and others); remove it")
    for name in config:
        # DeepSpeed takes no notice of fields that it does not know.
        near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.85)
        if near and name not in _FIELDS:
            raise ValueError(f"{path} has {name!r}; did you mean {near[0]!r}?")
    if not isinstance(config.get("train_micro_batch_size_per_gpu"), int):
        raise ValueError(f"{path} needs 'train_micro_batch_size_per_gpu' as a whole number (samples a rank at once)")
    accumulation = config.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(
            f"{path} has 'gradient_accumulation_steps' {accumulation!r}; write a whole number of at least 1"
        )
    for name in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"{path} has {name!r} {config[name]!r}; write an object, as in deepspeed_configs/")
    if "train_batch_size" in config:
        raise ValueError(
            f"{path} has 'train_batch_size', which follows from micro-batch, accumulation and ranks; remove it"
        )

    def autos(value: Any, where: str) -> Iterator[str]:
        if value == "auto":
            yield where
        for key, item in value.items() if isinstance(value, dict) else ():
            yield from autos(item, f"{where}.{key}".lstrip("."))

    found = list(autos(config, ""))
    if found:
        raise ValueError(f'{path} has "auto" for {", ".join(found)}, which only other trainers fill in; write numbers')
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"{path} sets ZeRO stage {stage}; use 1, 2 or 3 (zero_optimization.stage)")
    if config.get("bf16", {}).get("check_grad_overflow") is False:
        raise ValueError(
            f"{path} has bf16.check_grad_overflow false, with which a step of no finite numbers would be taken; remove it"
        )
    if stage == 1 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ValueError(
            f"{path} has data_types.grad_accum_dtype fp32 at ZeRO stage 1, for which DeepSpeed has another kind of optimizer; "
            "use stage 2, or remove it"
        )
    if config.get("fp16", {}).get("enabled") and get_accelerator().device_name() == "cpu":
        raise ValueError(f"{path} enables fp16, which processors do not train in; use bf16 or neither")
    return config


class Engine:
    """A model under DeepSpeed: forward, backward, step, and what ranks have to agree on."""

    def __init__(
        self,
        runtime: Runtime,
        make_model: Callable[[], nn.Module],
        config: dict[str, Any],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        start: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        """`start`: weights that parameters start from, by name; given on all ranks or none, at stage 3 empty on all but the
        first;
        `compiled`: run the model through torch.compile."""
        self.runtime = runtime
        self.stage = int(config["zero_optimization"]["stage"])
        self.micro_batch = int(config["train_micro_batch_size_per_gpu"])
        self.accumulation = int(config.get("gradient_accumulation_steps", 1))
        self.global_batch = self.micro_batch * self.accumulation * runtime.ranks
        parts = {name: config.get(name) for name in ("zero_optimization", "bf16", "fp16", "data_types")}
        self.layout = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        """Digest of what decides, besides ranks, how states lie in the files of a checkpoint."""
        # Under ZeRO-3 no rank ever holds the whole model.
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=self.stage == 3):
            model = make_model()
        for name, parameter in model.named_parameters() if start is not None else ():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                if start is not None and name in start:
                    parameter.data.copy_(start[name])
        self.n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model),
            # A client optimizer is ours to answer for; DeepSpeed otherwise asks for this flag.
            config={"zero_allow_untested_optimizer": True, "steps_per_print": 10**9, **config},
        )
        self.dtype = next(self.deepspeed.module.parameters()).dtype
        # A script for joining the weights goes with every checkpoint otherwise; `t2i export` joins them.
        self.deepspeed._copy_recovery_script = lambda _: None
        if compiled:
            self.deepspeed.compile()

    @property
    def module(self) -> Any:
        """The model itself."""
        return self.deepspeed.module

    def to_device(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor on this rank's device, floating point ones in the model's precision."""
        if tensor is None:
            return None
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(self.runtime.device, dtype, non_blocking=True)

    def step(self, micro_batches: Sequence[tuple[Tensor | None, ...]], lr: float) -> Tensor:
        """One optimizer step over `accumulation` micro-batches; returns their losses on this rank (nats), float32
        [accumulation] on its device. See `skipped`."""
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        self.deepspeed.train()
        for inputs in micro_batches:
            loss = self.deepspeed(*(self.to_device(tensor) for tensor in inputs))
            # Times 1, or not a number where the loss is none: so are then all gradients, on all ranks, and DeepSpeed
            # leaves this step out.
            self.deepspeed.backward(loss * (loss.detach() * 0 + 1))
            self.deepspeed.step()
            losses.append(loss.detach().float())
        return torch.stack(losses)

    @torch.no_grad()
    def evaluate(self, inputs: tuple[Tensor | None, ...]) -> float:
        """Loss of one batch without dropout; every rank has to call it equally often."""
        self.deepspeed.eval()
        loss = float(self.deepspeed(*(self.to_device(tensor) for tensor in inputs)))
        self.deepspeed.train()
        return loss

    @property
    def skipped(self) -> bool:
        """Whether the last step was left out, since its loss or gradients were no finite numbers; alike on all ranks."""
        return bool(self.deepspeed.optimizer.overflow)

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out since the run began."""
        return int(self.deepspeed.skipped_steps)

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(total)
        return total.tolist()

    def most(self, value: float) -> float:
        """The largest of a number over all ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, in the order of the ranks, on all of them."""
        every: list[Any] = [None] * self.runtime.ranks
        dist.all_gather_object(every, value)
        return every

    def first_of(self, value: str | None) -> str | None:
        """The first text that is not None, in the order of the ranks, on all of them."""
        return next((value for value in self.gather(value) if value is not None), None)

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum_over_ranks([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    # Checkpoints

    def write_with(self, writer: Any) -> None:
        """Have checkpoints written by this "checkpoint engine" of DeepSpeed's kind."""
        self.deepspeed.checkpoint_engine = writer

    def checkpoint_bytes(self, averaged: bool) -> int:
        """About how large a checkpoint is; `averaged`: with an average of the weights."""
        return checkpoint_bytes(self.n_parameters, self.stage, self.dtype.itemsize, averaged)

    def load(self, folder: Path) -> None:
        """Load a checkpoint of as many ranks and the same stage."""
        loaded, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None, f"{folder} is marked whole and does not load"

    def restore(self, saved: SavedStates, step: int) -> None:
        """Go on from a checkpoint of any number of ranks and any stage."""
        restore(self.deepspeed, self.runtime.rank, saved)
        self.deepspeed.global_steps = step
        self.deepspeed.global_samples = step * self.global_batch
        self.barrier()

    def weights_on_first(self) -> dict[str, Tensor] | None:
        """A copy of all weights in the memory of the first rank's processor, None elsewhere; every rank has to call it."""
        first = self.runtime.is_first
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.module.named_buffers() if first}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            # One at a time: a rank need not have room for them all.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if first:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights if first else None


def broadcast_bytes(runtime: Runtime, make: Callable[[], bytes]) -> bytes:
    """What `make` returns on the first rank, on every rank. An exception there is raised everywhere."""
    answer: list[Any] = [None]
    if runtime.is_first:
        try:
            answer = [make()]
        except Exception as error:  # the others wait for an answer; raised on all of them below
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    result: bytes = answer[0]
    return result
