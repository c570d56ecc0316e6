"""Section `precision`: where a job computes or sends in 16 bits. Weights of the dense part, Adam's state and row-wise sums stay fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from exfm.data.errors import UserError

Sent = Literal["fp32", "fp16", "bf16"]
BF16_CAPABILITY = 8  # of a CUDA device: Ampere, also for tf32


class PrecisionConfig(BaseModel):
    """dense: of the dense part's products (bf16: autocast; tf32: on tensor cores, from and to fp32). embeddings_forward, embeddings_backward: pooled embeddings and their gradients on
    their way between ranks. gradients: of the dense part between ranks. stochastic_rounding: of updates of fp16 rows; default: on CUDA.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dense: Literal["fp32", "tf32", "bf16"] = "fp32"
    embeddings_forward: Sent = "fp32"
    embeddings_backward: Sent = "fp32"
    gradients: Literal["fp32", "bf16"] = "fp32"
    stochastic_rounding: bool | None = Field(None, description="CUDA only; FBGEMM's CPU kernels round to nearest")

    def check(self, device: torch.device, engine: str) -> None:
        """UserError for what the device has not under a dense engine: TorchRec and FBGEMM would silently do something else."""
        if device.type == "cpu":
            if self.dense == "tf32":
                raise UserError("precision.dense is tf32, which only CUDA devices have; use fp32 or bf16")
            for name in ("embeddings_forward", "embeddings_backward"):
                if getattr(self, name) == "bf16":
                    raise UserError(
                        f"precision.{name} is bf16, which cannot be sent between CPU ranks; use fp16 or fp32"
                    )
            if self.gradients == "bf16" and engine == "ddp":
                raise UserError(
                    "precision.gradients is bf16, which ddp cannot send between CPU ranks; use fp32, or dense_engine.kind: fsdp or deepspeed"
                )
            if self.stochastic_rounding:
                raise UserError(
                    "precision.stochastic_rounding is true, but FBGEMM's CPU kernels round to nearest; leave it out, or train on a GPU"
                )
        elif torch.cuda.get_device_capability(device)[0] < BF16_CAPABILITY:
            for name in ("tf32", "bf16"):
                if name in self.model_dump().values():
                    raise UserError(
                        f"precision asks for {name}, which {torch.cuda.get_device_name(device)} has not; use fp16 for embeddings and fp32 else"
                    )

    def codecs(self, device_type: str) -> Any:
        """TorchRec's, for a sharder; None where everything is sent as fp32."""
        from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

        kinds = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}
        config = QCommsConfig(kinds[self.embeddings_forward], kinds[self.embeddings_backward])
        return get_qcomm_codecs_registry(config, device=torch.device(device_type))

    def set_products(self) -> None:
        """Of this process: whether fp32 products may be rounded to tf32."""
        torch.set_float32_matmul_precision("high" if self.dense == "tf32" else "highest")

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """In which the dense part's forward pass runs."""
        return torch.autocast(device.type, torch.bfloat16) if self.dense == "bf16" else nullcontext()

    def compress(self, module: nn.Module) -> None:
        """Send the gradients of a DDP module as bf16 where that is asked for."""
        if self.gradients == "bf16" and isinstance(module, DistributedDataParallel):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            module.register_comm_hook(None, bf16_compress_hook)
