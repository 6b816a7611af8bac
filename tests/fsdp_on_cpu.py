r"""Runs recipes/sft.py under FSDP2 on CPU processes, in any precision.

accelerate itself would run DDP there.

accelerate launch --config_file accelerate_configs/fsdp.yaml tests/fsdp_on_cpu.py \
    --config recipes/demo/attn_r16.yaml

With SCALED in the environment the loss is scaled as under fp16, which itself needs a GPU. Gradients
are unscaled before they are clipped there, which accelerate does for fp16 alone.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # before they see the devices
import sftlab.startup.preload  # noqa: F401

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import load_script

begin, prepare = PartialState.__init__, Accelerator.prepare


def as_on_gpus(self: PartialState, *args: object, **kwargs: object) -> None:
    """AcceleratorState makes FSDP of several GPUs alone."""
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and "ACCELERATE_USE_FSDP" in os.environ:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def scaled(self: Accelerator, *args: object, **kwargs: object) -> object:
    """The scaler that mixed_precision fp16 would bring."""
    self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=64.0)
    return prepare(self, *args, **kwargs)


def unscale(self: Accelerator, optimizer: object = None) -> None:
    """As Accelerator does under fp16."""
    for wrapped in self._optimizers:
        self.scaler.unscale_(wrapped.optimizer)


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState.__init__ = as_on_gpus
    if "SCALED" in os.environ:
        Accelerator.prepare, Accelerator.unscale_gradients = scaled, unscale
    sft = load_script("recipes/sft.py")
    sft.check_devices = lambda launch: None
    sft.main(sys.argv[1:])
