"""The loss that spreads tokens over the experts of a mixture trains routers, and only them."""

from trl import SFTTrainer


def leave_out_frozen_router(trainer: SFTTrainer) -> str | None:
    """Leave the router's loss out where no router trains; returns why, or None where it stays.

    trl adds it to every mixture (Fedus et al. 2021, arXiv 2101.03961, equation 4). A recipe that
    sets `router_aux_loss_coef` is obeyed.
    """
    if not trainer.aux_loss_enabled or trainer.args.router_aux_loss_coef is not None:
        return None
    trained = (name for name, one in trainer.model.named_parameters() if one.requires_grad)
    if any({"router", "gate"} & set(name.split(".")) for name in trained):
        return None
    trainer.aux_loss_enabled = False
    trainer.model.config.get_text_config().output_router_logits = False
    return "the router is frozen; set router_aux_loss_coef to add it"
