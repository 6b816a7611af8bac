"""The kernels that are compiled before the first step are those of every step."""

import sys
import threading
import types

import pytest
import torch
from conftest import arguments, short_fields
from packed_training import build, examples, losses_and_gradients

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.fastpath import fused_loss, kernel_warmup, mlp_ops, selection, varlen_attention
from sftlab.models.layers import Attention, Layers
from sftlab.models.loading import load_config


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "per_device_train_batch_size": "4", "lora_dropout": "0"}


def form(*values: object) -> tuple:
    """What Triton compiles a kernel for:

    dtypes, whether pointers are aligned, and sizes that are constants to it.
    """
    return tuple(
        (
            value.dtype,
            value.data_ptr() % 16,
            value.is_contiguous(),
            value.shape[1:] if value.dim() > 2 else None,
        )
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    )


@pytest.mark.parametrize(
    "weights, dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_the_rehearsed_kernels_are_those_of_every_step(fields, monkeypatch, weights, dtype):
    called = {}

    def attention_forward(query, key, value, pieces, scale, *rest):
        called.setdefault("forward", set()).add(
            form(query, key, value, pieces[0], pieces[1], scale, *rest)
        )
        return torch.zeros_like(query), query.new_zeros(
            query.shape[1], query.shape[0], dtype=torch.float32
        )

    def attention_backward(gradient, query, key, value, output, lse, pieces, scale, *rest):
        tensors = (gradient, query, key, value, output, lse[0])
        called.setdefault("backward", set()).add(form(*tensors, pieces[0], pieces[1], scale, *rest))
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    def cross_entropy_(logits, *columns):
        called.setdefault("loss", set()).add(
            (logits.shape[1], logits.stride(0), form(logits, *columns))
        )
        plain(logits, *columns)

    plain = fused_loss.cross_entropy_
    stub = types.ModuleType("sftlab.fastpath.triton_kernels")
    stub.attention_forward, stub.attention_backward = attention_forward, attention_backward
    monkeypatch.setitem(sys.modules, "sftlab.fastpath.triton_kernels", stub)
    monkeypatch.setattr(varlen_attention, "why_not", lambda layers, longest: None)
    monkeypatch.setattr(fused_loss, "cross_entropy_", cross_entropy_)
    trainer = build(fields, packing="true")
    for weight in trainer.model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.to(weights)
    kinds = trainer.fast.layers.distinct
    kernel_warmup.rehearse(
        *(trainer.model.config, kinds, [trainer.fast.attention_tile], dtype, torch.device("cpu")),
        fused_loss=True,
        float8_head=False,
    )
    rehearsed, called = called, {}
    assert {name: len(forms) for name, forms in rehearsed.items()} == {
        "forward": 1,
        "backward": 1,
        "loss": 1,
    }
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for count in range(1, 9):
            losses_and_gradients(trainer, examples(count))
    assert called == rehearsed


def test_the_kernels_of_fused_lora_that_are_rehearsed_are_those_of_every_step(fields, monkeypatch):
    called, plain = {}, {}

    def note(name):
        def noted(*given):
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            forms = [(t.dtype, t.stride(0), t.shape[1], t.data_ptr() % 16) for t in tensors]
            numbers = [one for one in given if not isinstance(one, torch.Tensor)]
            called.setdefault(name, set()).add((*forms, *numbers))
            return plain[name](*given)

        return noted

    for name in ("gated", "gated_backward_", "copy"):
        plain[name] = getattr(mlp_ops, name)
        monkeypatch.setattr(mlp_ops, name, note(name))
    trainer = build(fields | {"lora_target_modules": "all-linear"}, fused_lora="true")
    rank = next(iter(trainer.model.peft_config.values())).r
    device = torch.device("cpu")
    kernel_warmup.rehearse_mlp(trainer.model.config, rank, torch.float32, device)
    rehearsed, called = called, {}
    assert {name: len(forms) for name, forms in rehearsed.items()} == dict.fromkeys(plain, 1)
    for count in range(1, 4):
        losses_and_gradients(trainer, examples(count))
    assert called == rehearsed


def test_the_kernels_of_fused_lora_are_rehearsed_where_it_is_on(fields, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(kernel_warmup, "rehearse", lambda *given: None)
    monkeypatch.setattr(kernel_warmup, "rehearse_mlp", lambda *given: done.append(given))
    recipe, config, fast = packed(fields, Attention(2, 1, 16, 16, 0.25))
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    assert done == []
    fast.fused_lora = True
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    assert done == [(config, recipe.model.lora_r, torch.float32, torch.device("cuda", 0))]
    recipe.model.lora_dropout = 0.1
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    assert len(done) == 1


def packed(fields, attention):
    """A recipe, the config of its model, and packed rows in two layers of this attention."""
    recipe = parse_recipe(arguments(fields), Launch.from_environment())
    config = load_config(recipe.model.model_name_or_path, None, recipe.training)
    fast = selection.FastPath(
        packing=True,
        compile_layers=False,
        fused_loss=None,
        attn_implementation=None,
        layers=Layers(2, (attention,) * 2),
    )
    return recipe, config, fast


def test_kernels_are_rehearsed_on_the_gpu_of_the_process(fields, monkeypatch):
    done = []
    note = lambda what: lambda *given: done.append((threading.current_thread().name, what, *given))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(kernel_warmup, "rehearse", note("rehearsed"))
    recipe, config, fast = packed(fields, Attention(2, 1, 16, 16, 0.25, window=64))
    recipe.training.max_length = 64
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    gpu = torch.device("cuda", 1)
    # a window as long as the longest row is none
    kinds = (Attention(2, 1, 16, 16, 0.25),)
    assert done == [
        ("rehearsal_0", "device", gpu),
        ("rehearsal_0", "rehearsed", config, kinds, [64], torch.float32, gpu, True, False),
    ]
    recipe.training.dataset_num_proc = 2
    assert kernel_warmup.start_compilers(recipe, config, fast).done() and len(done) == 2, (
        "tokenizing forks"
    )


@pytest.mark.parametrize(
    ("longest", "began", "sizes"),
    [(2047, 128, [64]), (2048, 128, [64, 128]), (None, 128, [64, 128]), (None, None, [64])],
)
def test_kernels_are_rehearsed_for_the_tiles_that_rows_may_have(
    fields, monkeypatch, longest, began, sizes
):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(kernel_warmup, "rehearse", lambda *given: done.append(given[2]))
    recipe, config, fast = packed(fields, Attention(2, 1, 16, 16, 0.25))
    recipe.training.max_length = longest
    fast.continue_with_tile(began, settings_changed=False)
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    assert done == [sizes]


def test_a_gpu_that_cannot_be_set_ends_the_wait(fields, monkeypatch):
    def fail(device):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    recipe, config, fast = packed(fields, Attention(2, 1, 16, 16, 0.25))
    error = kernel_warmup.start_compilers(recipe, config, fast).exception(20)
    assert str(error) == "no such GPU"
