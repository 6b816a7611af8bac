"""LoRA and its frozen linear in one product compute what peft's layers do."""

import copy
import re
from collections.abc import Iterator
from shutil import which

import pytest
import torch
from conftest import short_fields
from packed_training import FOUR_BITS, build, train
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sftlab.fastpath import compile_layers, fused_lora
from sftlab.fastpath.dropout_bits import dropout_bits, is_kept, kept_share
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.fused_lora import fuse_lora, unfuse_lora
from sftlab.fastpath.lora_products import LoraProduct

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {  # Qwen2's q, k and v have biases
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def adapted(targets: list[str] = ALL, model: str = "llama", **fields: object) -> PeftModel:
    """A small float64 model whose B is not zero, which would leave A without a gradient."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": targets} | fields)
    found = get_peft_model(MODELS[model](), config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name or name.endswith("base_layer.bias"):
            nn.init.normal_(parameter, std=0.1)
    return found.double().train()


def fused(found: PeftModel) -> PeftModel:
    assert fuse_lora(found, next(found.parameters()).dtype) == {}
    return found


def loss_and_gradients(model: PeftModel, tokens: int = 50) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor's elements, over the tensor's largest."""
    assert one.keys() == other.keys()
    return max(((one[k] - other[k]).abs().max() / one[k].abs().max()).item() for k in one)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("targets", [ALL, ATTENTION, ["k_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "r": 20}, {"r": 48}], ids=str)
def test_losses_and_gradients_are_pefts(model, targets, fields):
    plain = loss_and_gradients(adapted(targets, model, **fields))
    mine = loss_and_gradients(fused(adapted(targets, model, **fields)))
    assert difference(plain, mine) < 1e-6


def compiled(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_(f, backend="aot_eager", fullgraph=True)
    )
    compile_layers.compile_layers(model.get_base_model())
    monkeypatch.undo()
    return model


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.3])
def test_compiled_layers_of_any_number_of_tokens_are_what_uncompiled_ones_are(monkeypatch, dropout):
    plain = fused(adapted(lora_dropout=dropout))
    mine = compiled(fused(adapted(lora_dropout=dropout)), monkeypatch)
    for tokens in (50, 70):
        found = []
        for model in (plain, mine):
            torch.manual_seed(2)
            found.append(loss_and_gradients(model, tokens))
        assert difference(*found) < 1e-6


def test_in_bfloat16_gradients_are_as_near_to_float32s_as_pefts():
    exact, found = loss_and_gradients(adapted()), []
    for with_products in (False, True):
        model = adapted().bfloat16()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        model = fused(model) if with_products else model
        with torch.autocast("cpu", torch.bfloat16):
            gradients = loss_and_gradients(model)
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        found.append(difference(exact, gradients))
    assert found[1] < 1.2 * found[0]


class SameMasks(nn.Module):
    """Dropout with the masks of the fused product; the first of a group draws them for all."""

    def __init__(self, dropped: float, place: int, group: dict[str, torch.Tensor], count: int):
        super().__init__()
        self.dropped, self.place, self.group, self.count = dropped, place, group, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place == 0:
            seed = torch.randint(2**62, (1,))
            shape = (x[..., 0].numel(), x.shape[-1])
            self.group["bits"] = dropout_bits(seed, self.count, *shape, self.dropped)
        kept = is_kept(self.group["bits"][self.place]).view_as(x)
        return torch.where(kept, x, 0) / kept_share(self.dropped)


def groups(model: PeftModel) -> Iterator[list[nn.Module]]:
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield [attention.q_proj, attention.k_proj, attention.v_proj]
        yield [attention.o_proj]
        yield [mlp.gate_proj, mlp.up_proj]
        yield [mlp.down_proj]


def test_under_the_same_masks_dropout_is_pefts():
    plain, found = adapted(lora_dropout=0.3), []
    for layers in groups(plain):
        shared: dict[str, torch.Tensor] = {}
        for place, layer in enumerate(layers):
            layer.lora_dropout["default"] = SameMasks(0.3, place, shared, len(layers))
    for model in (plain, fused(adapted(lora_dropout=0.3))):
        torch.manual_seed(2)
        found.append(loss_and_gradients(model))
    assert difference(*found) < 1e-6
    assert difference(found[0], loss_and_gradients(plain)) > 0.01, "other masks, other gradients"


def test_dropout_draws_every_mask_by_itself_and_none_in_evaluation():
    model = fused(adapted(lora_dropout=0.5))
    assert difference(loss_and_gradients(model), loss_and_gradients(model)) > 0.01
    plain = loss_and_gradients(adapted(lora_dropout=0.5).eval())
    assert difference(plain, loss_and_gradients(model.eval())) < 1e-6


def test_masks_keep_as_much_as_asked_and_are_independent():
    bits = dropout_bits(torch.tensor([7]), 3, 1000, 800, 0.05)
    kept = torch.stack([is_kept(one) for one in bits]).double()
    assert kept_share(0.05) == pytest.approx(0.95, abs=1e-5)
    assert kept.mean().item() == pytest.approx(0.95, abs=5e-4)
    assert (kept.mean(1) - 0.95).abs().max() < 0.05, "columns"
    assert (kept.mean(2) - 0.95).abs().max() < 0.05, "rows"
    correlations = torch.corrcoef(torch.cat([kept.flatten(1), kept[:1].roll(1, 2).flatten(1)]))
    assert (correlations - torch.eye(4)).abs().max() < 5e-3
    again = dropout_bits(torch.tensor([7]), 3, 1000, 800, 0.05)
    assert torch.equal(bits, again)
    assert not torch.equal(bits, dropout_bits(torch.tensor([8]), 3, 1000, 800, 0.05))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_see_the_same_masks_again(reentrant):
    found = []
    for checkpointed in (False, True):
        model = fused(adapted(lora_dropout=0.3))
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        found.append(loss_and_gradients(model))
    assert difference(*found) < 1e-6


def test_names_parameters_and_what_is_saved_stay_pefts():
    plain, mine = adapted(), fused(adapted())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in mine.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in mine.named_modules()]
    saved = [get_peft_model_state_dict(model) for model in (plain, mine)]
    assert difference(*saved) == 0


def test_weights_that_were_replaced_in_memory_are_read_anew():
    model = fused(adapted())
    loss_and_gradients(model)  # holds the weights

    def scaled(factor: float) -> dict[str, torch.Tensor]:
        state = model.state_dict().items()
        return {name: one * (factor if "base_layer" in name else 1) for name, one in state}

    def replace_one() -> None:
        layer = next(m for m in model.modules() if isinstance(m, LoraProduct))
        layer.base_layer.weight.data = layer.base_layer.weight.data * 2

    for change in (
        lambda: model.load_state_dict(scaled(1.1)),
        lambda: model.load_state_dict(scaled(0.9), assign=True),
        replace_one,
        lambda: model.float().double(),
    ):
        change()
        plain = copy.deepcopy(model)
        unfuse_lora(plain)
        assert difference(loss_and_gradients(plain), loss_and_gradients(model)) < 1e-7


def test_disabled_and_merged_adapters_are_pefts():
    plain, mine = adapted(), fused(adapted())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        with plain.disable_adapter(), mine.disable_adapter():
            assert torch.equal(plain(ids).logits, mine(ids).logits)
        tuned = plain(ids).logits
        mine.merge_adapter()
        torch.testing.assert_close(mine(ids).logits, tuned, atol=1e-5, rtol=0)
        mine.unmerge_adapter()
        torch.testing.assert_close(mine(ids).logits, tuned, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.merge_and_unload()(ids).logits, tuned, atol=1e-5, rtol=0)


def test_a_second_adapter_that_is_active_is_pefts():
    plain, mine = adapted(), fused(adapted())
    for model in (plain, mine):
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=4, target_modules=ALL, init_lora_weights=False))
        model.set_adapter("second")
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) < 1e-6
    for model in (plain, mine):
        model.base_model.set_adapter(["default", "second"])
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) < 1e-6


def test_layers_that_share_an_input_and_are_called_with_others_are_right():
    model = fused(adapted())
    model(torch.zeros(1, 8, dtype=torch.long))
    layers = next(groups(model))
    plain = next(groups(adapted()))
    first, second = torch.randn(2, 1, 5, 64, dtype=torch.float64)
    for inputs in ((first, second, first), (first, first, second), (first, first, first)):
        for layer, peft, x in zip(layers, plain, inputs, strict=True):
            torch.testing.assert_close(layer(x), peft(x), atol=1e-5, rtol=0)
    for layer, peft in ((layers[0], plain[0]), (layers[0], plain[0]), (layers[2], plain[2])):
        torch.testing.assert_close(layer(first), peft(first), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"use_dora": True}, "DoraLinearVariant changes the LoRA update"),
        ({"lora_bias": True}, "LoRA has a bias"),
    ],
    ids=str,
)
def test_what_is_not_known_stays_on_pefts_path(fields, reason):
    mine, targets = adapted(["q_proj", "k_proj"], "qwen2", **fields), 4
    assert fuse_lora(mine, torch.float64) == {reason: targets}
    assert not any(isinstance(module, LoraProduct) for module in mine.modules())
    plain = adapted(["q_proj", "k_proj"], "qwen2", **fields)
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) == 0


def test_a_linear_that_trains_and_one_of_float8_stay_on_pefts_path():
    model = adapted(["q_proj"])
    freeze_in_float8(model)
    (reason,) = fuse_lora(model, torch.float64)
    assert reason == "products in float8 give bfloat16, and the others torch.float64"
    model = adapted(["q_proj"])
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    assert fuse_lora(model, torch.float64) == {"the linear under LoRA trains": 1}


def test_a_layer_outside_the_decoder_and_one_before_its_first_forward_are_pefts():
    plain, mine = (adapted(["q_proj", "lm_head"]) for _ in range(2))
    assert fuse_lora(mine, torch.float64) == {"they are outside the decoder": 1}
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    first, other = (m.get_base_model().model.layers[0].self_attn.q_proj for m in (mine, plain))
    assert torch.equal(first(x), other(x))
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) < 1e-6


def test_inputs_whose_size_bits_do_not_fill_stay_on_pefts_path_under_dropout():
    model = nn.Sequential(nn.Linear(12, 8))
    found = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1))
    (reason,) = fuse_lora(found, torch.float32)
    assert reason == "dropout needs inputs whose size is a multiple of 8"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="inductor's kernels need a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_a_gpu_compiled_layers_have_the_gradients_of_uncompiled_ones(dropout):
    found = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = fused(adapted(lora_dropout=dropout).float().cuda())
        if is_compiled:
            compile_layers.compile_layers(model.get_base_model())
        torch.manual_seed(2)
        with torch._inductor.config.patch(fallback_random=True):  # the seeds of uncompiled masks
            found.append(loss_and_gradients(model))
    assert difference(*found) < 1e-4


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    return short_fields(base, rows, tmp_path / "run")


def test_a_recipe_switches_it_on_and_off_and_the_run_says_so(fields):
    on, off = build(fields, fused_lora="true"), build(fields)
    assert on.what_ran()["fused_lora"] is True
    assert off.what_ran()["fused_lora"] is False
    assert any(isinstance(module, LoraProduct) for module in on.model.modules())
    assert not any(isinstance(module, LoraProduct) for module in off.model.modules())


def test_a_training_with_it_is_the_training_without(fields):
    found = []
    for switch in ("true", "false"):
        trainer = build(fields, fused_lora=switch, save_strategy="no", eval_strategy="no")
        found.append([entry["loss"] for entry in train(trainer)])
        assert trainer.what_ran()["compute"]["linear"] == "Linear"
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][-1] < found[0][0] - 0.1


def test_a_training_with_dropout_continues_exactly(fields):
    fields = fields | {"fused_lora": "true", "lora_dropout": "0.3", "eval_strategy": "no"}
    whole = build(fields)
    train(whole)
    again = build(fields)
    train(again, resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-3")
    saved = [get_peft_model_state_dict(one.model) for one in (whole, again)]
    assert difference(*saved) == 0


@pytest.mark.long
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_compiled_nothing_is_copied_to_write_beside_it():
    """Inductor writes into a part of a matrix in place, or into a copy of the whole."""
    torch._dynamo.reset()
    mine = fused(adapted().bfloat16())
    compile_layers.compile_layers(mine.get_base_model())
    _, codes = run_and_get_code(lambda: loss_and_gradients(mine))
    layers = [code for code in codes if "cpp_fused_copy_slice" in code]
    assert len(layers) == 2, "the layers' forward and backward"
    for code in layers:
        written = re.findall(r"^ +cpp_fused_copy_slice_\d+\((.*)\)", code, re.MULTILINE)
        tensors = [[one for one in call.split(", ") if not one.startswith("s")] for call in written]
        assert {len(one) for one in tensors} == {2}, "what is written, and where"


def test_it_is_refused_where_no_layer_can(fields):
    matrices = "LoRA's matrices are torch.bfloat16, and the products torch.float32"
    with pytest.raises(ValueError, match=f"fused_lora is not possible here: 6 of 6 .*{matrices}"):
        build(fields | FOUR_BITS, fused_lora="true")
    with pytest.raises(ValueError, match="there is no LoRA layer"):
        build(fields, use_peft="false", fused_lora="true")
    with pytest.raises(ValueError, match="6 of 6 LoRA layers: DoraLinearVariant changes"):
        build(fields, use_dora="true", fused_lora="true")


def test_sharded_weights_and_those_of_another_dtype_than_the_products_are_refused(fields):
    trainer = build(fields)
    trainer.fast.fused_lora = trainer.fast.needs_fused_lora = True
    for strategy, dtype, why in (
        ("fsdp", torch.float32, "FSDP shards the frozen weights"),
        ("single", torch.bfloat16, "weights are torch.float32, and the products torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=why):
            fused_lora.take_fused_lora(trainer.model, trainer.fast, strategy, dtype)


def test_layers_that_stay_on_pefts_path_are_noted(fields, monkeypatch):
    why_not, asked = fused_lora.why_not, []

    def first_only(layer, dtype):
        asked.append(layer)
        return why_not(layer, dtype) if len(asked) == 1 else "of another kind"

    monkeypatch.setattr(fused_lora, "why_not", first_only)
    trainer = build(fields, fused_lora="true")
    others = f"{len(asked) - 1} of {len(asked)} LoRA layers: of another kind"
    assert trainer.fast.reasons["fused_lora"] == f"for {others}"
