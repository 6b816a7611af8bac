"""Does a model have the adapter that a file holds, after it was loaded?

peft gives tensors of an adapter the names that transformers gives a checkpoint's. Where such a rule
misses (Laguna's shared experts), LoRA matrices keep what they were drawn as, and peft only warns.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open


def refuse_other_tensors(model: PeftModel, folder: Path) -> None:
    """Raise ValueError where a model's adapter is not the one that was saved in `folder`.

    A tensor may be missing or unexpected in the file, or another one in the model. Embeddings that
    peft saves with the adapter are not looked at.
    """
    adapter = getattr(model, "active_adapter", "default")
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        held = set(file.keys())
        others = [
            name for name in sorted(held & set(own)) if _differs(file.get_tensor(name), own[name])
        ]
    missing = set(own) - held
    # of embeddings that are targets, peft saves the base weights as well
    unexpected = {one for one in held - set(own) if "lora_" in one}
    if missing or unexpected:
        parts = {"missing": missing, "unexpected": unexpected}
        named = [f"{what} {', '.join(sorted(one)[:4])}" for what, one in parts.items() if one]
        raise ValueError(
            f"{folder} holds other tensors than its adapter_config.json asks for: "
            f"{'; '.join(named)}"
        )
    if others:
        raise ValueError(
            f"{len(others)} of {len(held)} tensors of {folder} are not in the model that peft "
            f"loaded them into, {others[0]} for one: train anew and leave such modules out with "
            "--exclude_modules"
        )


def _differs(saved: torch.Tensor, own: torch.Tensor) -> bool:
    own = own.full_tensor() if hasattr(own, "full_tensor") else own
    if saved.shape != own.shape:
        return True
    own = own.detach().to(saved.device)
    return not torch.allclose(saved.to(own.dtype), own, rtol=0, atol=0, equal_nan=True)
