"""LoRA+: the B matrices learn faster than the A matrices (Hayou et al. 2024, arXiv 2402.12354)."""

from torch import nn
from torch.optim import Optimizer


def speed_up_b(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Multiply the learning rate of the B matrices, and of biases beside them, by `ratio`.

    They get groups of their own behind those of the optimizer, with the same settings otherwise.
    """
    fast = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_B." in name or ".lora_embedding_B." in name
    }
    for group in list(optimizer.param_groups):
        mine = [one for one in group["params"] if id(one) in fast]
        if mine:
            group["params"] = [one for one in group["params"] if id(one) not in fast]
            optimizer.add_param_group({**group, "params": mine, "lr": group["lr"] * ratio})
