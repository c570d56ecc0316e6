"""The served model under DeepSpeed's ZeRO. Nothing else of a job is under it: tables and distillation heads never see it.

stage 1: Adam's state and the weights it updates are cut over all ranks; stage 2: gradients too; stage 3: the model's weights too,
each gathered as its module runs. DeepSpeed cuts weights laid end to end, so a rank's part of one begins and ends anywhere in it.
All is fp32 (products are bf16 under autocast), so no loss is scaled: that would scale the tables' gradients too.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exfm.checkpoints.canonical import Run
from exfm.trainer.engines import BUCKET, PERSISTENT, DenseEngineConfig
from exfm.trainer.env import RankEnv, deepspeed_env
from exfm.trainer.optim import DenseOptimConfig, adam_state, dense_optimizer
from exfm.trainer.precision import PrecisionConfig


class Computing(nn.Module):
    """A module in a job's precision: DeepSpeed ends an autocast that was begun outside its engine."""

    def __init__(self, module: nn.Module, precision: PrecisionConfig) -> None:
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, dense: Tensor, pooled: Tensor) -> Any:
        with self.precision.computing(pooled.device):
            return self.module(dense, pooled)


@dataclass(frozen=True)
class Part:
    """What this rank has of a parameter, live. weight: None where every rank has it whole."""

    name: str
    shape: tuple[int, ...]
    weight: Run | None
    exp_avg: Run
    exp_avg_sq: Run
    step: Tensor


class Zero:
    """engine: the wrapped model, called in its place. All ranks make, step and refresh it together; needs a process group."""

    def __init__(
        self,
        config: DenseEngineConfig,
        optim: DenseOptimConfig,
        precision: PrecisionConfig,
        served: nn.Module,
        env: RankEnv,
        device: torch.device,
    ) -> None:
        self.served, self.stage = served, config.stage
        self.not_finite = False  # whether DeepSpeed left out an update because its gradients were not finite
        parameters = list(served.parameters())
        settings = _settings(config.stage, optim.clip_norm, precision.gradients, sum(p.numel() for p in parameters))
        deepspeed = deepspeed_here(device, env)
        if self.stage == 3:
            _save_weights_themselves(served)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=Computing(served, precision), optimizer=dense_optimizer(optim, parameters), config=settings
        )
        for number, module in enumerate(self.engine.module.modules()):
            module.ds_id = number  # DeepSpeed's count goes on over the life of a process, and ranks compare it
        flat = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        self.flat: list[Tensor] = getattr(self.optimizer, flat)
        for part in self.flat:
            adam_state(self.optimizer.optimizer, part)  # type: ignore[arg-type]

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.not_finite |= bool(self.optimizer.overflow)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def refresh(self) -> None:
        """After a restore: make the weights that are updated, and those that stay gathered, equal to the restored ones."""
        self.optimizer.refresh_fp32_params()
        if self.stage == 3 and (kept := self.optimizer.persistent_parameters):
            for p in kept:
                p.partition(has_been_updated=False)
            kept[0].all_gather(kept)

    def weights(self) -> list[Tensor]:
        """What this rank holds of the model between steps."""
        parameters: list[Any] = list(self.served.parameters())
        return [p.ds_tensor if self.stage == 3 else p for p in parameters]

    def parts(self) -> Iterator[Part]:
        """Of every parameter."""
        for name, p in self.served.named_parameters():
            yield self._cut_part(name, p) if self.stage == 3 else self._whole_part(name, p)

    def _whole_part(self, name: str, p: Any) -> Part:
        """The weights are whole; of what updates them this rank has those that begin in its part of the flat group."""
        fragment = p._hp_mapping
        group, first, count, start = 0, 0, 0, 0
        if fragment is not None:
            group, start = fragment.param_group_index, fragment.lp_fragment_address.start
            first, count = fragment.hp_fragment_address.start, fragment.hp_fragment_address.numel
        state = self.optimizer.optimizer.state[self.flat[group]]
        average, square = (state[key].narrow(0, first, count) for key in ("exp_avg", "exp_avg_sq"))
        return Part(name, tuple(p.shape), None, (average, start), (square, start), state["step"])

    def _cut_part(self, name: str, p: Any) -> Part:
        """Every parameter by itself is cut into equal parts, the last one padded."""
        group, first, count = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        state = self.optimizer.optimizer.state[self.flat[group]]
        start = torch.distributed.get_rank() * p.partition_numel()
        own = max(0, min(count, p.ds_numel - start))
        average, square = (state[key].narrow(0, first, own) for key in ("exp_avg", "exp_avg_sq"))
        weight = p.ds_tensor.data.view(-1).narrow(0, 0, own)
        return Part(name, tuple(p.ds_shape), (weight, start), (average, start), (square, start), state["step"])

    def close(self) -> None:
        """Take its hooks off the model."""
        self.engine.destroy()


def deepspeed_here(device: torch.device, env: RankEnv) -> Any:
    """The library, ready for the process group that exists now."""
    deepspeed_env(device, env.local_rank, str(Path(tempfile.gettempdir(), f"exfm-extensions-{env.local_rank}")))
    import logging

    import deepspeed
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.ERROR)
    # an op that it would compile for minutes, to share memory between the ranks of a node
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ranks compare it, and some may have been through more
    Init.param_id = 0
    # it keeps groups, which may be of a process group that is gone
    groups._release_process_group_references()
    comm.comm.cdb = None
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _save_weights_themselves(served: nn.Module) -> None:
    """Torch's linear layer saves a view of its weight for backward, which stays whole until then; DeepSpeed's saves the weight.

    By itself DeepSpeed would put its own in the place of torch's function for the whole process.
    """
    for module in served.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap(x, module.weight, module.bias)  # type: ignore[no-any-return]


def _settings(stage: int, clip_norm: float, gradients: str, parameters: int) -> dict[str, Any]:
    bucket = min(BUCKET, parameters)
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts examples by it, and nothing else
        "gradient_clipping": clip_norm,
        "communication_data_type": gradients,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * BUCKET,
            # a weight is gathered for its module, and let go after it
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": bucket // 2,
            "stage3_param_persistence_threshold": PERSISTENT,
            # these two would replace functions of torch for the whole process
            "memory_efficient_linear": False,
            "override_module_apply": False,
        },
    }
