"""Makes an adapter that began with parts of the base model's weights fit that model as it is."""

import math
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sftlab.files import write_json
from sftlab.schema import read_object

Matrices = dict[str, torch.Tensor]


def initial_matrices(model: PeftModel) -> Matrices:
    """Returns a copy of the LoRA matrices as they begin, on the CPU, by their names in a file.

    Raises ValueError where a weight is smaller than the rank: peft would begin with fewer rows.
    """
    config = model.peft_config["default"]
    found = get_peft_model_state_dict(model)
    for name, tensor in found.items():
        if "lora_A" in name and tensor.shape[0] != config.r:
            layer = name.partition(".lora_A")[0]
            raise ValueError(
                f"lora_r is {config.r}, and init_lora_weights {config.init_lora_weights} finds "
                f"only {tensor.shape[0]} directions in {layer}: give a lower rank"
            )
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def make_plain(folder: Path, initial: Matrices) -> None:
    """Convert a saved adapter to one of twice the rank that belongs to the unchanged base model.

    The frozen weights are W - s B0 A0, so the trained model is W + s (B A - B0 A0). peft's
    `subtract_mutated_init` does the same, and leaves out `modules_to_save`.
    """
    weights, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, initial[name].to(tensor)], dim=0).contiguous()
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -initial[name].to(tensor)], dim=1).contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    config = read_object(path)
    doubled = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": doubled * config["lora_alpha"]}
    write_json(path, config | {"init_lora_weights": True})
