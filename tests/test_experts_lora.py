"""LoRA on the stacked weights of experts gives what peft's merged weights give, without a copy."""

import copy
import csv
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import load_script
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sftlab.fastpath import compile_layers, experts_lora, experts_products
from sftlab.fastpath.experts import GROUPED, ONE_BY_ONE
from sftlab.fastpath.experts_lora import FACTORED, MERGED, take_experts_lora
from sftlab.fastpath.experts_products import ParamWrapper

models = load_script("docs/make_models.py")
FAMILIES = [
    *("Qwen 3 MoE", "gpt-oss", "Mixtral", "Granite MoE", "DeepSeek V3", "LFM2 MoE"),
    *("Qwen3-Next", "Nemotron-H"),
]
PRODUCTS = [ONE_BY_ONE, GROUPED]
ODD = {"r": 3, "lora_alpha": 7, "use_rslora": True}
IDS = torch.arange(3, 67)[None]
GROUPED_MM = torch.nn.functional.grouped_mm


def adapted(family="Qwen 3 MoE", product=ONE_BY_ONE, only="", base=None, **fields):
    """A tiny model with LoRA on its experts, whose B is not zero, on peft's path."""
    base = models.model_of(family) if base is None else base
    if base._can_set_experts_implementation():
        base.set_experts_implementation(product)
    names = [name for name in models.stacked_names(base) if only in name]
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    settings |= {"target_parameters": names}
    model = get_peft_model(base, LoraConfig(**settings | fields))
    draw(model)
    return model.train()


def draw(model, seed=1):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def factored(model):
    assert take_experts_lora(model) == (FACTORED, None)
    return model


def outputs_and_gradients(model, ids=IDS):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach()} | trained


def difference(one, other):
    """The largest difference of a tensor, over the tensor's norm."""
    assert one.keys() == other.keys()
    return float(torch.stack([(one[k] - other[k]).norm() / one[k].norm() for k in one]).max())


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts(family, product):
    right = outputs_and_gradients(adapted(family, product))
    assert sum(".experts." in name for name in right) >= 4
    found = outputs_and_gradients(factored(adapted(family, product)))
    assert difference(right, found) < 1e-5


class Careless(torch.autograd.Function):
    """The grouped product, whose gradient of an expert without tokens is not written."""

    @staticmethod
    def forward(ctx, x, matrices, ends):
        ctx.save_for_backward(x, matrices, ends)
        return GROUPED_MM(x, matrices, offs=ends)

    @staticmethod
    def backward(ctx, gradient):
        x, matrices, ends = (one.detach() for one in ctx.saved_tensors)
        x.requires_grad_()
        matrices.requires_grad_()
        with torch.enable_grad():
            y = GROUPED_MM(x, matrices, offs=ends)
        into_x, into_matrices = torch.autograd.grad(y, (x, matrices), gradient)
        into_matrices[ends.diff(prepend=ends.new_zeros(1)) == 0] = float("nan")
        return into_x, into_matrices, None


def test_experts_without_tokens_have_no_gradient(monkeypatch):
    few = IDS[:, :2]
    right = outputs_and_gradients(adapted("gpt-oss"), few)
    mine = factored(adapted("gpt-oss", GROUPED))
    monkeypatch.setattr(
        experts_products.functional, "grouped_mm", lambda x, w, offs: Careless.apply(x, w, offs)
    )
    assert difference(right, outputs_and_gradients(mine, few)) < 1e-5


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("more", [{"only": "down"}, {"only": "up"}, ODD], ids=str)
@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_of_one_weight_alone_and_of_an_odd_rank_too(family, product, more):
    right = outputs_and_gradients(adapted(family, product, **more))
    assert difference(right, outputs_and_gradients(factored(adapted(family, product, **more)))) < (
        1e-5
    )


class Made(TorchDispatchMode):
    """The bytes of the largest tensor that operations make."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(one) for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        made = func(*args, **kwargs or {})
        for one in tree_leaves(made):
            if torch.is_tensor(one) and storage_of(one) not in given:
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return made


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


def largest_kept(model, ids):
    """The bytes of the largest tensor that autograd saves, weights aside."""
    known, sizes = {storage_of(one) for one in model.parameters()}, [0]

    def keep(tensor):
        if storage_of(tensor) not in known:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        model(input_ids=ids, labels=ids, use_cache=False)
    return max(sizes)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES[:5])
def test_no_copy_of_the_experts_is_made_or_kept(family, product):
    found, few = [], IDS[:, :16]  # so few tokens that nothing else is as large
    for take in (lambda model: model, factored):
        model = take(adapted(family, product))
        weights = [p for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n]
        copied = min(one.nbytes for one in weights)
        kept = largest_kept(model, few)
        with Made() as made:
            outputs_and_gradients(model, few)
        found.append((kept >= copied, made.largest >= copied))
    assert found == [(True, True), (False, False)], "peft's path does both"


@pytest.fixture
def one_module():
    """One module of gpt-oss's experts with LoRA, which a router would send other tokens to.

    Called with a forward and a dtype, it returns outputs and gradients.
    """
    layer = experts_lora.adapted_experts(factored(adapted("gpt-oss", GROUPED)))[0]
    torch.manual_seed(0)
    given = [torch.randn(256, 64), torch.rand(256, 4).argsort(1)[:, :2], torch.rand(256, 2)]
    trained = {name: one for name, one in layer.named_parameters() if "lora_" in name}
    cast = [one for name, one in layer.named_parameters() if "lora_" not in name]
    cast += [given[0], given[2]]
    for one in cast:
        one.data = one.data.bfloat16()

    def run(forward, dtype=torch.bfloat16):
        for one in cast:
            one.data = one.data.to(dtype)
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = forward(layer, *given).float()
        y.square().sum().backward()
        return {name: one.grad.clone() for name, one in trained.items()} | {"y": y.detach()}

    return run


def test_in_bfloat16_experts_are_as_near_to_float32s_as_pefts(one_module):
    plain, mine = one_module(lora.ParamWrapper.forward), one_module(ParamWrapper.forward)
    exact = one_module(lora.ParamWrapper.forward, torch.float32)
    assert difference(exact, mine) < 1.3 * difference(exact, plain) < 0.03


def test_compiled_code_gives_the_kernels_layouts_that_they_take(one_module):
    torch._dynamo.reset()
    compiled = torch.compile(ParamWrapper.forward, fullgraph=True, dynamic=True)
    assert difference(one_module(ParamWrapper.forward), one_module(compiled)) < 0.02


@pytest.mark.parametrize("family", ["Qwen 3 MoE", "gpt-oss"])
def test_an_adapter_is_pefts_own(family, tmp_path):
    """What is saved loads with plain peft, and what plain peft saved is gone on with."""
    plain, mine = adapted(family), factored(adapted(family))
    saved = get_peft_model_state_dict(mine)
    assert saved.keys() == get_peft_model_state_dict(plain).keys()
    draw(mine, seed=2)
    mine.save_pretrained(tmp_path / "mine")
    plain.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(models.model_of(family), tmp_path / "mine")
    assert not any(isinstance(one, ParamWrapper) for one in loaded.modules())
    again = factored(PeftModel.from_pretrained(models.model_of(family), tmp_path / "plain"))
    with torch.no_grad():
        for one, other in ((mine.eval(), loaded), (plain.eval(), again)):
            expected = one(input_ids=IDS).logits
            assert (other(input_ids=IDS).logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["Qwen 3 MoE", "gpt-oss"])
def test_merged_weights_answer_as_the_adapter(family):
    mine = factored(adapted(family)).eval()
    with torch.no_grad():
        expected = mine(input_ids=IDS).logits
        merged = mine.merge_and_unload(safe_merge=True)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert (merged(input_ids=IDS).logits - expected).norm() < 1e-5 * expected.norm()


def test_what_is_not_one_adapter_is_left_to_peft():
    plain, mine = adapted(), factored(adapted())
    for model in (plain, mine):
        torch.manual_seed(2)  # it draws A
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        draw(model, seed=3)

    def both(ids=IDS):
        with torch.no_grad():
            one, other = (model(input_ids=ids).logits for model in (plain, mine))
        assert (one - other).norm() < 1e-5 * one.norm()
        return one

    found = [both()]
    for adapters in (["default", "other"], "other"):
        for model in (plain, mine):
            model.base_model.set_adapter(adapters)
        found.append(both())
    contexts = [model.disable_adapter() for model in (plain, mine)]
    with contexts[0], contexts[1]:
        found.append(both())
    for model in (plain, mine):
        model.merge_adapter()
    assert (both() - found[2]).norm() < 1e-5 * found[2].norm()
    for model in (plain, mine):
        model.unmerge_adapter()
    both()
    apart = [float((a - b).norm()) for a, b in pairwise(found)]
    assert min(apart) > 0.1, "four different models answered"


def test_a_hook_on_the_experts_sees_them():
    mine, seen = factored(adapted()), []
    experts = [one for one in mine.modules() if isinstance(one, Qwen3MoeExperts)]
    mine(input_ids=IDS)
    for one in experts:
        one.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    mine(input_ids=IDS)
    assert len(seen) == len(experts) == 2


@pytest.mark.parametrize(
    ("family", "targets", "why"),
    [
        ("Llama 4 (text)", [], "for 2 of 2 modules of experts: Llama4TextExperts has a product of"),
        (
            "gpt-oss",
            ["gate_up_proj_bias"],
            "gate_up_proj_bias of GptOssExperts are not the weights",
        ),
    ],
)
def test_experts_that_are_not_understood_are_left_to_peft(family, targets, why):
    base = models.model_of(family)
    names = models.stacked_names(base) + [f"mlp.experts.{name}" for name in targets]
    right = outputs_and_gradients(adapted(family, target_parameters=names))
    model = adapted(family, target_parameters=names)
    taken, reason = take_experts_lora(model)
    assert taken == MERGED and why in reason
    assert difference(right, outputs_and_gradients(model)) == 0


def test_experts_whose_forward_was_replaced_are_left_to_peft():
    model = adapted()
    first = next(one for one in model.modules() if isinstance(one, Qwen3MoeExperts))
    first.forward = first.forward  # as where weights are kept on a CPU until they are needed
    taken, reason = take_experts_lora(model)
    assert taken == FACTORED
    assert reason == "for 1 of 2 modules of experts: Qwen3MoeExperts has a product of its own"
    assert difference(outputs_and_gradients(adapted()), outputs_and_gradients(model)) < 1e-5


def test_models_without_lora_on_experts_have_nothing_to_take():
    model = get_peft_model(models.model_of("Mixtral"), LoraConfig(target_modules=["q_proj"], r=4))
    assert take_experts_lora(model) == (None, None)


def test_experts_that_would_give_other_values_are_left_to_peft(monkeypatch):
    own = Qwen3MoeExperts.forward
    monkeypatch.setattr(Qwen3MoeExperts, "forward", lambda *given: 1.01 * own(*given))
    taken, reason = take_experts_lora(adapted())
    assert taken == MERGED
    assert "2 of 2 modules of experts: Qwen3MoeExperts computes other values" in reason
    assert "1.0% apart" in reason


def test_one_of_a_kind_is_compared_and_nothing_changes(monkeypatch):
    asked, own = [], experts_lora.differs
    monkeypatch.setattr(experts_lora, "differs", lambda one: asked.append(one) or own(one))
    model = adapted()
    before = {name: one.clone() for name, one in model.named_parameters()}
    state = torch.get_rng_state()
    factored(model)
    assert len(asked) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    model.add_module("more", adapted(base=models.model_of("Mixtral")))
    factored(model)
    assert len(asked) == 3, "experts of another kind are compared too"


def compiled(model, monkeypatch, **how):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager", **how))
    compile_layers.compile_layers(model.get_base_model())
    monkeypatch.undo()
    return model


@pytest.mark.parametrize("family", [pytest.param("Qwen 3 MoE", marks=pytest.mark.long), "gpt-oss"])
def test_layers_are_compiled_in_one_graph_for_any_number_of_tokens(family, monkeypatch):
    make = partial(adapted, family, GROUPED)
    plain = factored(make().bfloat16())
    mine = compiled(factored(make().bfloat16()), monkeypatch, fullgraph=True)
    for tokens in (64, 50, 71):
        ids = IDS[:, :tokens] if tokens < 64 else torch.arange(3, 3 + tokens)[None]
        right, found = (outputs_and_gradients(one, ids) for one in (plain, mine))
        assert difference(right, found) < 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama 4 (text)", "Qwen 3 MoE"])
def test_where_peft_merges_in_every_forward_nothing_is_compiled_anew(family, monkeypatch):
    """Of Qwen 3 MoE, peft adds LoRA to the router that all-linear means too."""
    more = {"target_modules": "all-linear", "target_parameters": None}
    if family != "Qwen 3 MoE":
        more = {}
    plain, mine = adapted(family, **more), adapted(family, **more)
    taken, _ = take_experts_lora(mine)
    assert taken == (FACTORED if more else MERGED)
    mine, graphs = compiled(mine, monkeypatch), []
    for tokens in (40, 50, 61, 45, 57):
        right, found = (outputs_and_gradients(one, IDS[:, :tokens]) for one in (plain, mine))
        assert difference(right, found) < 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


def test_the_benchmark_compares_both_ways(monkeypatch, tmp_path):
    script = load_script("benchmarks/experts_lora.py")
    tiny = {"small": script._qwen(16, 128, 64)}
    monkeypatch.setattr(script, "SHAPES", tiny)
    script.main(["--shape", "small", "--tokens", "24", "--rounds", "1", "--out", str(tmp_path)])
    lines = list(csv.DictReader((tmp_path / "experts_lora.csv").open(encoding="utf-8")))
    assert [(line["product"], line["way"]) for line in lines] == [
        (product, way) for product in PRODUCTS for way in (script.COPY, script.ALONE)
    ]
    assert not any(line["note"] for line in lines)
    assert all(float(line["apart"]) < 1e-5 for line in lines)
    for copied, alone in (lines[:2], lines[2:]):
        assert float(alone["seconds"]) > 0 and float(alone["peak_mb"]) < float(copied["peak_mb"])
