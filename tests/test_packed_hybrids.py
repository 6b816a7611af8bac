"""Packed rows of models whose layers are not all attention: no state crosses from row to row."""

import copy
import sys
from functools import partial
from inspect import getclosurevars, isfunction
from types import ModuleType

import pytest
import torch
from conftest import load_script, pair_rows, short_fields, write_jsonl
from packed_training import (
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from preference_runs import pair_fields
from tiny_base import byte_tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import use_kernel_func_from_hub_with_fallback

from sftlab.data import collator
from sftlab.data.collator import Collator, boundaries, for_the_model
from sftlab.fastpath import packed_mixers, varlen_attention
from sftlab.fastpath.compile_layers import compile_layers
from sftlab.fastpath.packed_mixers import pack_mixers, shifted_products
from sftlab.models import layers, mixers
from sftlab.models.layers import decoder_of, describe
from sftlab.models.mixers import PACKED, is_kernel
from sftlab.training import recorded_trainer

models = load_script("docs/make_models.py")
HYBRIDS = [
    *("LFM2", "LFM2 MoE", "Qwen3-Next", "Qwen 3.5 (text)", "Qwen 3.5 MoE (text)", "OLMo Hybrid"),
    *("Kimi Linear", "Granite 4 hybrid", "Bamba", "Falcon-H1", "Nemotron-H"),
]
ROWS = [
    {"input_ids": [1 + (7 * n + n * n) % 90 for n in range(start, start + length)],
     "labels": [5] * length}
    for start, length in ((0, 19), (3, 1), (11, 37))
]  # fmt: skip


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let packing run here, with the reference attention."""
    pack_on_a_cpu(monkeypatch, reference_attention)
    varlen_attention.register(models.LONGEST)


def hidden_states(model, batch):
    given = {name: value for name, value in for_the_model(batch).items() if name != "labels"}
    return decoder_of(model)(**given, use_cache=False).last_hidden_state


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_every_class_with_a_packed_form_has_a_family_here():
    found = {type(m).__name__ for one in HYBRIDS for m in models.model_of(one).modules()}
    assert found >= PACKED


@pytest.mark.parametrize("family", HYBRIDS)
def test_packed_rows_and_their_gradients_are_those_of_rows_alone(family, on_a_cpu):
    alone = models.model_of(family).train().requires_grad_()
    expected = [hidden_states(alone, Collator(0, packed=False)([row]))[0] for row in ROWS]
    expected = torch.cat(expected)
    packed = AutoModelForCausalLM.from_config(alone.config, attn_implementation="varlen").train()
    packed.load_state_dict(alone.state_dict())
    pack_mixers(packed)
    found = hidden_states(packed, Collator(0, packed=True, mixers=True)(ROWS))[0]
    found = found[: len(expected)]
    assert (found - expected).norm() / expected.norm() < 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    right, found = gradients(alone), gradients(packed)
    assert set(found) == set(right)
    assert any("conv" in name for name in found)
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["LFM2", "Qwen 3.5 (text)", "Bamba"])
def test_padded_rows_go_through_transformers_own_functions(family):
    model, batch = models.model_of(family).train(), Collator(0, packed=False)(ROWS)
    before = hidden_states(model, batch)
    pack_mixers(model)
    assert torch.equal(hidden_states(model, batch), before)


def test_boundaries_leave_out_empty_sequences():
    found = boundaries([3, 1, 2, 0])
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert found["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert found["row_places"].tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert found["cu_seq_lens_q"].dtype == found["seq_idx"].dtype == torch.int32


def test_a_model_of_attention_alone_is_given_no_boundaries():
    given = {"input_ids", "labels", "position_ids", "tiles"}
    assert set(for_the_model(Collator(0, packed=True)(ROWS))) == given
    config = models.config_of("Llama 2, 3; SmolLM2")
    assert describe(config, AutoModelForCausalLM._model_mapping[type(config)]).mixers == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_shifted_products_are_each_rows_convolution(dtype, activation):
    torch.manual_seed(0)
    lengths = [5, 1, 2, 9]
    x, weight = torch.randn(1, 6, sum(lengths), dtype=dtype), torch.randn(6, 4, dtype=dtype)
    bias, seq_idx = torch.randn(6, dtype=dtype), boundaries(lengths)["seq_idx"]
    found = shifted_products(x, weight, bias, activation, seq_idx=seq_idx, other="ignored")
    rows = [
        F.conv1d(row.float(), weight.float()[:, None], bias.float(), padding=3, groups=6)
        for row in x.split(lengths, dim=-1)
    ]
    expected = torch.cat([row[..., :-3] for row in rows], -1)
    expected = F.silu(expected) if activation else expected
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.to(dtype).float(), atol=1e-5, rtol=0.01)


def test_kernels_of_a_package_are_told_the_boundaries(monkeypatch):
    calls = []
    ends = boundaries([2, 3])["cu_seq_lens_q"]
    delta = packed_mixers._delta_rule(lambda **kwargs: calls.append(kwargs), True)
    delta(cu_seqlens=ends, seq_idx=1)
    delta(cu_seq_lens_q=ends, seq_idx=1)
    assert all(call["cu_seqlens"] is ends for call in calls) and len(calls) == 2
    own = object()
    for take in ("_convolution", "_state_space", "_fused_state_space"):
        assert getattr(packed_mixers, take)(own, True) is own


@pytest.mark.parametrize("found", [False, True])
def test_a_kernel_is_known_by_what_transformers_found(monkeypatch, found):
    package = ModuleType("kernels_of_a_package")
    if found:
        package.mix = lambda x: x
    monkeypatch.setitem(sys.modules, package.__name__, package)
    decorated = use_kernel_func_from_hub_with_fallback("mix", package.__name__)(lambda x: -x)
    assert is_kernel(decorated) == found
    assert not is_kernel(lambda x: x)


@pytest.mark.parametrize("family", HYBRIDS)
def test_no_kernel_runs_on_tensors_without_numbers(monkeypatch, family):
    """A kernel would write to address zero, and no other kernel of the process would run."""
    layers._described.cache_clear()
    model = models.model_of(family)
    right = describe(model.config, type(model))

    def kernel(*args, **kwargs):
        raise AssertionError("a kernel ran")

    replaced = 0
    for modeling in {sys.modules[type(m).__module__] for m in mixers.packed_mixers(model)}:
        for name, own in list(vars(modeling).items()):
            own = getattr(own, "of_padded_rows", own)  # another test may have packed the model
            if isfunction(own) and "torch_function" in getclosurevars(own).nonlocals:
                package = ModuleType("kernels_of_a_package")
                monkeypatch.setitem(sys.modules, package.__name__, package)
                package.kernel = kernel
                decorate = use_kernel_func_from_hub_with_fallback("kernel", package.__name__)
                in_torch = getclosurevars(own).nonlocals["torch_function"]
                monkeypatch.setattr(modeling, name, decorate(in_torch))
                replaced += 1
    assert replaced
    layers._described.cache_clear()
    assert describe(model.config, type(model)) == right
    with pytest.raises(AssertionError, match="a kernel ran"):
        hidden_states(model.train(), Collator(0, packed=False)(ROWS))


# ---- whole trainings ----


@pytest.fixture
def hybrid(request, tmp_path):
    """Folder of a tiny random model of the named family, with a byte-level tokenizer."""
    config = AutoConfig.for_model(**models.config_of(request.param).to_dict() | {
        "vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    })  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    byte_tokenizer().save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


@pytest.fixture
def fields(hybrid, rows, tmp_path) -> dict[str, str]:
    short = short_fields(hybrid, rows, tmp_path / "run")
    more = {
        "per_device_train_batch_size": "4",
        "lora_dropout": "0",
        "lora_target_modules": "k_proj",
    }
    return {**short, **more}


@pytest.mark.parametrize("hybrid", ["LFM2", "Qwen 3.5 (text)"], indirect=True)
def test_a_packed_step_is_the_padded_one_and_is_checked_before(fields, on_a_cpu):
    found = []
    for switch in ("true", "false"):
        trainer = with_trained_lora(build(fields, packing=switch, max_steps=1))
        assert trainer.fast.packing == (switch == "true")
        found.append(losses_and_gradients(trainer, examples(5)))
    (nats, gradient), (expected, right) = found
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)
    for name, one in right.items():
        assert (gradient[name] - one).norm() <= 1e-3 * one.norm(), name
    assert len(train(build(fields, packing="true", max_steps=1))) == 1


@pytest.mark.parametrize("hybrid", ["LFM2", "Bamba"], indirect=True)
def test_a_hybrid_whose_rows_see_one_another_stops(fields, on_a_cpu, monkeypatch):
    honest = boundaries

    def of_one_sequence(lengths):
        return honest([sum(lengths)])

    monkeypatch.setattr(collator, "boundaries", of_one_sequence)
    trainer = build(fields, packing="true", max_steps=1)
    with torch.no_grad():  # random layers of so small a model hardly move their input
        for name, parameter in trainer.model.named_parameters():
            if "conv" in name or "out_proj" in name:
                parameter.mul_(20)
    with pytest.raises(RuntimeError, match=r"row 1's hidden states differ by .*--packing false"):
        train(trainer)


@pytest.mark.parametrize("hybrid", ["Bamba"], indirect=True)
def test_packed_pairs_of_a_hybrid_are_trls_own(hybrid, tmp_path, on_a_cpu):
    pairs = pair_fields(
        hybrid, write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60)), tmp_path / "run"
    )
    pairs |= {"lora_target_modules": "k_proj"}
    found = []
    for switch in ("true", "false"):
        trainer = with_trained_lora(build(pairs, packing=switch, fused_loss=switch))
        assert trainer.fast.packing == (switch == "true")
        rows = [trainer.train_dataset[n] for n in range(4)]
        model = trainer.model.train()
        loss = trainer.compute_loss(model, trainer.data_collator(rows))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, gradient), (expected, right) = found
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    for name, one in right.items():
        assert (gradient[name] - one).norm() <= 1e-3 * one.norm() + 1e-6, name
    assert len(train(build(pairs, packing="true", max_steps=1))) == 1


CPU = torch.device("cpu")


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("This Triton is wrong\non this GPU")


class Kernel:
    """A package's kernel of the gated delta rule, which counts its calls."""

    NAME = "torch_chunk_gated_delta_rule"

    def __init__(self, modeling):
        own = getattr(modeling, self.NAME)
        self.modeling, self.calls, self.after = modeling, 0, lambda found: found
        self.own = mixers._closure(getattr(own, "of_padded_rows", own))["torch_function"]

    def in_use(self):
        return getattr(self.modeling, self.NAME)

    def kernel(self, query, key, value, g, beta, cu_seqlens=None, **kwargs):
        self.calls += 1
        found, state = self.own(query, key, value, g, beta, **kwargs)
        return self.after(found), state


def with_a_kernel(monkeypatch):
    """Returns a hybrid whose recurrence a package computes, and the package's kernel."""
    model = models.model_of("Qwen 3.5 (text)").train()
    kernel = Kernel(sys.modules[type(mixers.packed_mixers(model)[0]).__module__])
    package = ModuleType("kernels_of_a_package")
    package.kernel = kernel.kernel
    monkeypatch.setitem(sys.modules, package.__name__, package)
    decorate = use_kernel_func_from_hub_with_fallback("kernel", package.__name__)
    monkeypatch.setattr(kernel.modeling, kernel.NAME, decorate(kernel.own))
    return model, kernel


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_layers_take_the_kernels(monkeypatch, on_a_cpu, packed):
    """torch 2.11 tells compiled code that it is exported, which has no kernels."""
    model, kernel = with_a_kernel(monkeypatch)
    if packed:
        model.set_attn_implementation("varlen")
    pack_mixers(model)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_layers(model.requires_grad_())
    for longer in (0, 64):
        rows = [{name: one + one[:1] * longer for name, one in row.items()} for row in ROWS[:2]]
        hidden_states(model, Collator(0, packed=packed, mixers=True)(rows)).sum().backward()
    assert kernel.calls == 2 * len(mixers.packed_mixers(model))


@pytest.mark.parametrize("fails", [False, True])
def test_kernels_that_do_not_train_here_are_left_out_with_their_reason(
    monkeypatch, on_a_cpu, fails
):
    model, kernel = with_a_kernel(monkeypatch)
    own = kernel.own
    kernel.after = _Fails.apply if fails else lambda found: found
    before = torch.get_rng_state()
    assert mixers.has_kernels(model)
    why = mixers.why_kernels_fail(model, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.grad is not None for p in model.parameters())
    assert why is None or why.endswith(
        "with its package's kernels: This Triton is wrong on this GPU"
    )
    assert fails == (why is not None)
    if not fails:
        return
    mixers.leave_out_kernels(model)
    assert kernel.in_use() is own and not mixers.has_kernels(model)
    alone = torch.cat([hidden_states(model, Collator(0, packed=False)([r]))[0] for r in ROWS])
    model.set_attn_implementation("varlen")
    pack_mixers(model)
    found = hidden_states(model, Collator(0, packed=True, mixers=True)(ROWS))[0][: len(alone)]
    assert (found - alone).norm() / alone.norm() < 1e-5
    model.requires_grad_()
    hidden_states(model, Collator(0, packed=True, mixers=True)(ROWS)).sum().backward()


def test_a_mixer_that_is_not_where_it_trains_is_copied_there(monkeypatch):
    model = models.model_of("Qwen 3.5 (text)").to("meta")
    mixer = mixers.packed_mixers(model)[0]
    monkeypatch.setattr(copy, "deepcopy", lambda one: one.to_empty(device="cpu"))
    mixers._train_on_a_row(mixer, model.config.hidden_size, torch.float32, CPU)


@pytest.mark.parametrize(
    "here, why",
    [(True, None), (True, "FooMixer does not train"), (True, mixers.NO_KERNELS), (False, None)],
)
@pytest.mark.parametrize("hybrid", ["LFM2"], indirect=True)
def test_a_run_says_what_computes_its_mixers_and_goes_on_with_it(fields, monkeypatch, here, why):
    left = []
    monkeypatch.setattr(recorded_trainer, "has_kernels", lambda model: here)
    monkeypatch.setattr(recorded_trainer, "leave_out_kernels", left.append)
    monkeypatch.setattr(recorded_trainer, "why_kernels_fail", lambda *_: None)
    # another process found that they fail
    monkeypatch.setattr(recorded_trainer, "gather_object", lambda mine: [*mine, why])
    trainer = build(fields, max_steps=1)
    why = why if here else mixers.NO_KERNELS
    fast, by = trainer.fast, "torch" if why else "kernels"
    assert trainer.what_ran()["mixers"] == by and len(left) == bool(why)
    assert fast.reasons.get("mixer_kernels") == why
    fast.refuse_other_mixers(by, False)
    fast.refuse_other_mixers(None, False)
    other = "kernels" if why else "torch"
    fast.refuse_other_mixers(other, True)
    with pytest.raises(ValueError, match=f"began with mixers in {other}, .*--overwrite"):
        fast.refuse_other_mixers(other, False)


def test_a_model_without_packages_has_no_kernels():
    for family in ("Qwen 3.5 (text)", "LFM2", "Llama 2, 3; SmolLM2"):
        assert not mixers.has_kernels(models.model_of(family))
