"""How training is spread over processes, and in which precision: Hugging Face Accelerate, set up for one training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

# Accelerate would have the gradients of all processes summed in bfloat16.
_SUMS_IN_FLOAT32 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
_BLOCKS = ["ResnetBlock2D", "BasicTransformerBlock"]  # of diffusers' UNet: what FSDP gathers at a time


def accelerator(
    bfloat16: bool = False,
    sharded: bool = False,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
    on_gpu: bool = True,
) -> Accelerator:
    """The processes of this one's torch.distributed group, or this one alone.

    Args:
        bfloat16: matrix products in bfloat16 on a GPU; weights stay float32.
        sharded: weights, gradients and moments are spread over the processes (FSDP 2); else each has all (DDP).
        trackers: "tensorboard", "wandb", "mlflow".
        folder: where trackers keep their files.
        on_gpu: if there is one; a GPU that others use may be seen, too.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for a whole process, and may be of another run
    on_cpu = not (on_gpu and torch.cuda.is_available())
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=_BLOCKS,
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=_SUMS_IN_FLOAT32 if bfloat16 and not on_cpu else None,
        )
    found = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if bfloat16 and not on_cpu else "no",
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of them less
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if (
        sharded and found.distributed_type == DistributedType.MULTI_CPU
    ):  # Accelerate shards on GPUs only, torch anywhere
        found.state.distributed_type, found.state.fsdp_plugin = DistributedType.FSDP, plugin
    if found.num_processes > 1 and found.device.type == "cuda":  # DDP is told this number, where it asks for the device
        found.state.local_process_index = found.device.index
    return found
