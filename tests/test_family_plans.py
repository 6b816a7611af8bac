"""Plans of every family of docs/models.md: FLOPs are torch's, and memory what autograd saves."""

from functools import partial

import pytest
import torch
from conftest import load_script
from peft import get_peft_model
from planned_steps import PARTITIONED, kernels_without_numbers
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, NemotronConfig
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from sftlab.data.collator import Collator, for_the_model
from sftlab.fastpath.compile_layers import compile_layers, decoder_layers
from sftlab.fastpath.experts import GROUPED, ONE_BY_ONE
from sftlab.fastpath.experts_lora import factor_experts
from sftlab.fastpath.fused_lora import fuse_lora
from sftlab.fastpath.lora_products import LoraProduct, copy_matrices
from sftlab.fastpath.packed_mixers import pack_mixers
from sftlab.measurement.flops import flops_per_token
from sftlab.models.layers import decoder_of, describe
from sftlab.models.lora_config import lora_config
from sftlab.planning import recipe_step
from sftlab.planning.step_memory import kept_bytes, memory

models = load_script("docs/make_models.py")
IDS = torch.arange(3, 67)[None]
# FLOPs of weights that torch multiplies in batches; other batched products are of states
BATCHED = {
    "Llama 4 (text)": lambda config, flops: flops / config.num_local_experts,  # it takes them all
    "RecurrentGemma": lambda config, flops: flops,
    "Mamba": lambda config, flops: flops - 4 * config.intermediate_size * config.state_size,
}
REFUSED = {"RecurrentGemma", "Mamba"}
PLANNED = [family for family in models.FAMILIES if family not in REFUSED]
LENGTHS = (64, 30, 50, 48)  # as long as models.ROWS says


@pytest.mark.parametrize("family", models.FAMILIES)
def test_flops_are_those_that_torch_counts(family):
    model = models.model_of(family)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(ONE_BY_ONE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder_of(model)(input_ids=IDS, use_cache=False)
    counted = {str(name).rpartition(".")[2]: n for name, n in
               counter.get_flop_counts()["Global"].items()}  # fmt: skip
    found = sum(counted.get(name, 0) for name in ("mm", "addmm", "baddbmm")) / IDS.numel()
    if family in BATCHED:
        found += BATCHED[family](model.config, counted["bmm"] / IDS.numel())
    taps = next((m.kernel_size[0] for m in model.modules() if isinstance(m, torch.nn.Conv1d)), 1)
    # torch counts the outputs that reach over the end too
    found += counted.get("convolution", 0) / (IDS.numel() + taps - 1)
    assert found == pytest.approx(flops_per_token(model).token / 2, rel=1e-12)


def without_dropout(family):
    """A tiny model's config. A CPU keeps more of dropout than a GPU does."""
    config = models.config_of(family)
    for name in vars(config):
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    return config


def adapted(config, recipe, packs):
    """A tiny model with numbers and LoRA, as a GPU would train it in bf16."""
    attention = {"attn_implementation": "varlen"} if packs else {}
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention)
    # as if there were a layer before the first
    base.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
    pack_mixers(base)
    if base._can_set_experts_implementation():
        base.set_experts_implementation(GROUPED)
    model = get_peft_model(base, lora_config(recipe.model))
    assert factor_experts(model) == {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train()


class Saved:
    """What autograd saves within decoder layers, without weights and what all layers are given."""

    def __init__(self, model):
        self.known, self.bytes, self.within = WeakIdKeyDictionary(), 0, False
        self.know(model.parameters())
        for layer in decoder_layers(model.get_base_model()):
            layer.register_forward_pre_hook(self.enter, with_kwargs=True)
            layer.register_forward_hook(self.leave)

    def know(self, tensors):
        for one in tensors:
            self.known[one.untyped_storage()] = True

    def enter(self, layer, args, kwargs):
        shared = {name: one for name, one in kwargs.items() if name != "hidden_states"}
        self.know(one for one in tree_leaves((args[1:], shared)) if torch.is_tensor(one))
        self.within = True

    def leave(self, *_):
        self.within = False

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if self.within and storage not in self.known:
            self.known[storage] = True
            self.bytes += storage.nbytes()
        return tensor.detach()


def saved_bytes(model, lengths, packs):
    """The bytes that layers save of a forward, and its tokens."""
    base, saved = model.get_base_model(), Saved(model)
    mixers = packs and describe(base.config, type(base)).mixers > 0
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    batch = for_the_model(Collator(0, packed=packs, mixers=mixers)(rows))
    del batch["labels"]
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda one: one),
    ):
        decoder_of(base)(**batch, use_cache=False)
    return saved.bytes, batch["input_ids"].numel()


def saved_a_token(model, packs):
    """What a token more saves, so that copies of weights do not count."""
    one, two = (saved_bytes(model, LENGTHS * times, packs) for times in (2, 4))
    return (two[0] - one[0]) / (two[1] - one[1])


def planned_and_held(family, *more):
    """The bytes a token that a family's layers keep, as planned and as autograd saves them."""
    config = without_dropout(family)
    step, recipe = models.planned(config, *more)
    held = saved_a_token(adapted(config, recipe, step.packed), step.packed)
    return kept_bytes(step) * step.shape.layers, held


@pytest.mark.parametrize("family", PLANNED)
def test_planned_bytes_are_those_that_autograd_saves(family, monkeypatch):
    kernels_without_numbers(monkeypatch)
    planned, held = planned_and_held(family)
    assert planned == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("family", ["Qwen 3 MoE", "gpt-oss", "Granite 4 hybrid"])
def test_lora_on_experts_is_planned_as_autograd_saves_it(family, monkeypatch):
    kernels_without_numbers(monkeypatch)
    names = models.stacked_names(models.model_of(family))
    planned, held = planned_and_held(family, "--lora_target_parameters", *names)
    assert planned == pytest.approx(held, rel=0.02)
    without, _ = planned_and_held(family)
    assert planned > 1.05 * without or family == "Qwen 3 MoE", "whose all-linear has the experts"


@pytest.mark.parametrize("family", ["ERNIE 4.5", "Hunyuan (dense)"])
def test_fused_lora_of_measured_layers_is_planned_as_autograd_saves_it(family, monkeypatch):
    kernels_without_numbers(monkeypatch)
    plain = adapted

    def with_fused_lora(*given):
        model = plain(*given)
        assert fuse_lora(model, torch.bfloat16) == {}
        products = [one for one in model.modules() if isinstance(one, LoraProduct)]
        copy_matrices(list(dict.fromkeys(one.together for one in products)))
        return model

    monkeypatch.setitem(globals(), "adapted", with_fused_lora)
    planned, held = planned_and_held(family, "--fused_lora=true")
    assert planned == pytest.approx(held, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("family", ["Phi-2", "LFM2"])
def test_compiled_layers_are_planned_as_inductors_partitioner_cuts_them(family, monkeypatch):
    kernels_without_numbers(monkeypatch)
    config = models.config_of(family)
    step, recipe = models.planned(config, "--compile_layers=true")
    model = adapted(config, recipe, packs=True)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=PARTITIONED))
    compile_layers(model.get_base_model())
    held = saved_a_token(model, packs=True)
    assert kept_bytes(step) * step.shape.layers == pytest.approx(held, rel=0.02)
    uncompiled, _ = models.planned(config)
    assert kept_bytes(step) < 0.9 * kept_bytes(uncompiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_measured_llama_layers_are_those_that_are_worked_out(compiled, monkeypatch):
    config = models.config_of("Llama 2, 3; SmolLM2")
    asked = ("--lora_dropout=0.1", f"--compile_layers={compiled}")
    worked_out, _ = models.planned(config, *asked)
    monkeypatch.setattr(recipe_step, "_keeps_what_is_worked_out", lambda *_: False)
    found, _ = models.planned(config, *asked)
    assert worked_out.measured is None and found.measured.adapters == 7
    assert kept_bytes(found) == pytest.approx(kept_bytes(worked_out), rel=0.01)


def test_rows_side_by_side_are_as_long_as_the_longest(monkeypatch):
    config = models.config_of("Bamba")
    even, _ = models.planned(config)
    monkeypatch.setattr(models, "ROWS", models.ROWS._replace(longest=128))
    uneven, _ = models.planned(config)
    assert kept_bytes(uneven) > 1.3 * kept_bytes(even)


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("Mamba", [], "mamba has layers that carry a state and have no packed form"),
        ("Phi-2", ["--fused_lora=true"], "no plan is made for fused_lora of phi"),
        ("Granite 4 hybrid", ["--dtype=float32"], "are made for bf16 alone"),
        ("Qwen3-Next", ["--use_peft=false"], "full fine-tuning of a mixture"),
        (
            "Llama 4 (text)",
            ["--lora_target_parameters", "feed_forward.experts.down_proj"],
            "LoRA on these experts, since Llama4TextExperts has a product of its own: leave out",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(family, more, why):
    with pytest.raises(ValueError, match=why):
        models.planned(models.config_of(family), *more)


def test_layers_that_do_not_run_are_one_sentence(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no numbers\nhere")

    monkeypatch.setattr(PhiDecoderLayer, "forward", broken)
    monkeypatch.setattr(recipe_step, "_FOUND", {})
    with pytest.raises(ValueError, match=r"layers of phi do not run without numbers \(no numbers"):
        models.planned(models.config_of("Phi-2"))


def test_a_whole_model_is_planned_too():
    config = models.config_of("LFM2")
    step, _ = models.planned(config, "--use_peft=false")
    assert step.measured.adapters == 0
    assert step.measured.kept > 0 and memory(step).gradients == 0


def test_an_mlp_without_a_gate_is_measured():
    config = NemotronConfig(**models.SMALL, head_dim=16)
    step, _ = models.planned(config)
    gated, _ = models.planned(models.config_of("Llama 2, 3; SmolLM2"))
    assert step.measured and kept_bytes(step) < kept_bytes(gated)
