"""4-bit linears whose products run in float8, against plain float8 and products in 16 bits."""

import math

import pytest
import torch
from bitsandbytes import nn as bitsandbytes
from bitsandbytes.functional import dequantize_4bit
from conftest import pair_rows, short_fields, write_jsonl
from packed_training import (
    FOUR_BITS,
    assert_continues_exactly,
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from preference_runs import pair_fields
from test_four_bit_linear import BITSANDBYTES, Graphs, Ran, linear, product

from sftlab.fastpath import four_bit_float8
from sftlab.fastpath.float8 import BACKWARD, FORWARD, float8_product, to_float8
from sftlab.fastpath.four_bit_float8 import Float8Linear4bit
from sftlab.fastpath.four_bit_layers import four_bit_linears, swap, take_four_bits
from sftlab.fastpath.selection import FastPath

FLOAT8 = "sftlab.four_bit_float8"


def swapped(nested=True, kind="nf4", was=torch.bfloat16, **kwargs):
    layer = linear(torch.bfloat16, nested, kind, was, **kwargs)
    assert swap([layer], torch.bfloat16, float8=True) == {}
    assert type(layer) is Float8Linear4bit
    return layer.train()


def drawn():
    """An input and a gradient, of rows of very different sizes."""
    torch.manual_seed(1)
    size = torch.logspace(-3, 3, 50)[:, None]
    return (torch.randn(2, 50, width).mul(size).bfloat16() for width in (128, 96))


@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested, kind", [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_products_are_those_of_plain_float8_and_near_those_in_16_bits(nested, kind, was):
    plain, layer = linear(torch.bfloat16, nested, kind, was), swapped(nested, kind, was)
    x, gradient = drawn()
    y, into_x, names = product(layer, x, gradient)
    assert names == [] and y.dtype == into_x.dtype == torch.bfloat16
    right, into_right, names = product(plain, x, gradient)
    assert names == [BITSANDBYTES]
    for found, exact, most in ((y, right, 0.05), (into_x, into_right, 0.07)):
        norms = [one.float().norm(dim=-1) for one in (found - exact, exact)]
        assert 0.01 < (norms[0] / norms[1]).mean() < most, "of every token, however small"
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state).float()
    whole = dequantize_4bit(plain.weight.data, plain.weight.quant_state)
    assert torch.equal(whole.float(), weight), "the stored weight is what it was"
    state = layer.weight.quant_state
    state.dtype = torch.float32
    weight, scale = dequantize_4bit(layer.weight, state), layer.scale
    assert scale.shape == (1, 128) and scale.unique().numel() == 1
    assert torch.frexp(scale[0, 0]).mantissa == 0.5, "a power of two changes no digit"
    weight = (weight / scale[0, 0]).to(FORWARD)
    rounded = to_float8(x.reshape(-1, 128), FORWARD, by_row=True)
    assert torch.equal(y.view(-1, 96), float8_product(*rounded, weight, scale))
    rounded = to_float8(gradient.reshape(-1, 96), BACKWARD, by_row=True)
    weight_t = weight.view(torch.uint8).t().contiguous().view(FORWARD)
    assert torch.equal(into_x.view(-1, 128), float8_product(*rounded, weight_t, scale))


def test_weights_that_are_stored_as_another_dtype_multiply_alike():
    """recipes/llama2-7b stores two weights of 4 bits in each byte of bfloat16."""
    made = bitsandbytes.Linear4bit(
        128, 96, bias=False, compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16
    )
    made.weight.data = linear_weight = torch.randn(96, 128).bfloat16()
    bytes_ = bitsandbytes.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16)
    bytes_.weight.data = linear_weight.clone()
    layers = [one.to("cpu") for one in (made, bytes_)]
    assert made.weight.dtype == torch.bfloat16 and bytes_.weight.dtype == torch.uint8
    assert swap(layers, torch.bfloat16, float8=True) == {}
    x, gradient = drawn()
    found = [product(one.train(), x, gradient)[:2] for one in layers]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_have_the_dtype_that_bitsandbytes_gives_them(asked):
    layer = swapped()
    x, gradient = (one.to(asked) for one in drawn())
    y, into_x, _ = product(layer, x, gradient)
    assert y.dtype == into_x.dtype == asked
    assert y.shape == (2, 50, 96) and into_x.shape == (2, 50, 128)


def test_an_evaluation_is_bitsandbytes_own_and_a_reference_is_not():
    """A reference runs forward in training mode, without a gradient."""
    plain, layer = linear(torch.bfloat16), swapped()
    x, _ = drawn()
    trained = layer(x.requires_grad_())
    with torch.no_grad():
        reference = layer(x)
        with Ran() as ran:
            evaluated = layer.eval()(x)
        assert ran.names == [BITSANDBYTES]
    assert torch.equal(reference, trained) and trained.requires_grad
    assert torch.equal(evaluated, plain(x)) and not torch.equal(evaluated, trained)
    assert layer.train()(x[:, :0]).shape == (2, 0, 96)


def test_nothing_is_kept_for_the_backward_but_the_4_bits():
    layer, kept = swapped(), []
    x, gradient = drawn()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        y = layer(x.requires_grad_())
    y.backward(gradient)
    tensors = {one.data_ptr() for one in kept}
    weight, state = layer.weight, layer.weight.quant_state
    own = weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, layer.scale
    assert tensors == {one.data_ptr() for one in own}


def test_compiled_it_is_one_graph_that_gives_each_weight_back_where_it_is_read():
    layer, graphs = swapped(), Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=graphs.backend, fullgraph=True)
    x, gradient = drawn()
    y, into_x, _ = product(layer, x, gradient)
    mine = x.clone().requires_grad_()
    found = compiled(mine)
    found.backward(gradient)
    assert torch.equal(found, y) and torch.equal(mine.grad, into_x)
    assert graphs.count(FLOAT8) == [1, 1]
    assert len(graphs.kept()) > 1 and (96, 128) not in graphs.kept()
    (node,) = [one for one in graphs.backward[0].nodes if str(one.target).startswith(FLOAT8)]
    assert node.args[-1].meta["val"].shape == (100, 96), "no forward can work it out"


def test_what_is_saved_is_what_it_was():
    before, layer = linear(torch.bfloat16), swapped()
    assert [*layer.state_dict()] == [*before.state_dict()]
    assert [n for n, _ in layer.named_parameters()] == ["weight"] and not layer.weight.requires_grad


def sizes(rows, columns):
    made = bitsandbytes.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16)
    return made.to(torch.bfloat16).to("cpu")


NOT_TAKEN = {
    "compute in torch.float16": lambda: linear(torch.float16),
    "has a bias": lambda: linear(torch.bfloat16, bias=torch.nn.Parameter(torch.zeros(96))),
    "has a forward of its own": lambda: linear(torch.bfloat16, forward=lambda x: x),
    "no multiples of 16": lambda: sizes(96, 104),
    "sizes are no multiples of 16": lambda: sizes(104, 96),
}


@pytest.mark.parametrize("reason", NOT_TAKEN)
def test_a_linear_that_cannot_multiply_in_float8_keeps_what_it_has(reason):
    layer = NOT_TAKEN[reason]()
    ((why, count),) = swap([layer], torch.bfloat16, float8=True).items()
    assert count == 1 and reason in why
    assert type(layer) is bitsandbytes.Linear4bit and "scale" not in vars(layer)


def test_some_linears_in_16_bits_are_said_and_all_of_them_refused():
    fast = FastPath(True, False, True, None, None)
    model = torch.nn.Sequential(linear(torch.bfloat16), sizes(104, 96))
    take_four_bits(model, fast, "single", torch.bfloat16, float8=True)
    assert fast.four_bit_weights == "one kernel, float8"
    assert fast.reasons == {
        "four_bit_float8": "for 1 of 2 linears: their sizes are no multiples of 16"
    }
    assert [type(one) for one in model] == [Float8Linear4bit, bitsandbytes.Linear4bit]
    sentence = (
        r"^fp8: no linear in 4 bits .* \(their sizes are .* of 16\): launch with single.yaml$"
    )
    with pytest.raises(ValueError, match=sentence):
        take_four_bits(model[1:], fast, "single", torch.bfloat16, float8=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_differ_are_counted_and_keep_products_in_16_bits(monkeypatch, transposed):
    own = four_bit_float8.four_bit_float8

    def other(*args):
        weight = own(*args)
        if args[10] == transposed:
            weight.view(torch.uint8).view(-1)[:7] ^= 1
        return weight

    monkeypatch.setattr(four_bit_float8, "four_bit_float8", other)
    layer = linear(torch.bfloat16)
    why = "7 of 12,288 weights in float8 are not plain torch's"
    assert swap([layer], torch.bfloat16, float8=True) == {why: 1}
    assert type(layer) is bitsandbytes.Linear4bit and "scale" not in vars(layer)


@pytest.mark.parametrize("name", ["outputs", "gradients"])
def test_products_that_are_far_off_stay_in_16_bits_with_the_figure(monkeypatch, name):
    def other(ctx, *args):
        found = own(ctx, *args)
        return 1.1 * found if name == "outputs" else (1.1 * found[0], *found[1:])

    method = "forward" if name == "outputs" else "backward"
    own = getattr(four_bit_float8._Product, method)
    monkeypatch.setattr(four_bit_float8._Product, method, staticmethod(other))
    layers = [linear(torch.bfloat16), linear(torch.bfloat16)]
    ((why, count),) = swap(layers, torch.bfloat16, float8=True).items()
    assert count == 2 and why.startswith(f"in float8 {name} are 1")
    assert {type(one) for one in layers} == {bitsandbytes.Linear4bit}


@pytest.fixture
def fields(base, rows, tmp_path, monkeypatch):
    pack_on_a_cpu(monkeypatch, reference_attention)
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    short = short_fields(base, rows, tmp_path / "run") | FOUR_BITS
    return {**short, "packing": "true", "lora_dropout": "0", "overwrite": "true"}


def test_a_training_under_fp8_takes_it_compiled_or_not(fields, monkeypatch):
    found = []
    for compiled in ("false", "true"):
        graphs = Graphs()
        graphs.take_compile(monkeypatch)
        trainer = with_trained_lora(build(fields, compile_layers=compiled))
        linears = four_bit_linears(trainer.model)
        assert {type(one) for one in linears} == {Float8Linear4bit}
        nats, gradients = losses_and_gradients(trainer, examples(5))
        found.append((nats, gradients))
        ran = trainer.what_ran()
        assert ran["precision"] == "fp8" and ran["quantization"] == "4bit"
        assert ran["four_bit_weights"] == "one kernel, float8"
        of_a_layer = len(linears) // trainer.model.config.num_hidden_layers
        assert graphs.count(FLOAT8) == ([of_a_layer] * 2 if compiled == "true" else [0, 0])
    (nats, gradients), (compiled_nats, compiled_gradients) = found
    assert (nats - compiled_nats).abs().mean() < 0.03
    for name, gradient in gradients.items():
        pair = gradient.flatten().double(), compiled_gradients[name].flatten().double()
        assert torch.cosine_similarity(*pair, dim=0) > 0.97, name


def test_a_training_under_fp8_learns_and_continues_exactly(fields):
    fields |= {"save_strategy": "steps", "save_steps": "3", "save_total_limit": "5"}
    assert_continues_exactly(fields)
    trainer = build(fields)
    losses = [entry["loss"] for entry in train(trainer)]
    assert losses[-1] < losses[0]
    assert trainer.what_ran()["compute"] == {
        "linear": "Float8Linear4bit",
        "output_dtype": "bfloat16",
    }


def test_fused_lora_that_is_asked_for_is_refused_with_the_reason(fields):
    sentence = r"fused_lora is not possible here: .* the products of the weights are in float8; "
    with pytest.raises(ValueError, match=sentence):
        build(fields, compile_layers="true", fused_lora="true")


@pytest.mark.parametrize("once", ["true", "false"])
def test_preference_tuning_begins_as_its_reference_in_steps_and_evaluations(
    base, tmp_path, monkeypatch, once
):
    """Steps multiply in float8, evaluations in 16 bits, and so does the reference of each."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    asked = pair_fields(base, pairs, tmp_path / "run") | FOUR_BITS
    asked |= {"precompute_ref_log_probs": once, "max_steps": "2", "lora_dropout": "0"}
    trainer = build(asked)
    assert {type(one) for one in four_bit_linears(trainer.model)} == {Float8Linear4bit}
    trainer.before_training()
    assert trainer.validation()["validation_reward_margin"] == 0
    assert train(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels run on a GPU")
@pytest.mark.parametrize("rows, columns", [(4096, 4096), (11008, 4096), (4096, 11008)])
def test_on_a_gpu_it_is_near_16_bits_and_faster(rows, columns):
    """Llama-2-7B's linears, 8,192 tokens; -s prints milliseconds and how far they are apart."""
    from triton.testing import do_bench

    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        made = bitsandbytes.Linear4bit(
            columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layers.append(made.bfloat16().to("cuda"))
    assert swap(layers[:1], torch.bfloat16, float8=True) == {}
    assert swap(layers[1:], torch.bfloat16) == {}
    x = torch.randn(8192, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(8192, rows, device="cuda", dtype=torch.bfloat16)
    found, ms = [], []
    for layer in layers:
        compiled = torch.compile(layer.train(), fullgraph=True)

        def both(compiled=compiled):
            y = compiled(x)
            return [y.detach(), *torch.autograd.grad(y, x, gradient)]

        found.append(both())
        ms.append(do_bench(both, warmup=50, rep=200))
    apart = [
        ((one - other).float().norm() / other.float().norm()).item()
        for one, other in zip(*found, strict=True)
    ]
    eight, sixteen = ms
    print(f"\n[{rows}, {columns}]: {eight:.3f} ms in float8, {sixteen:.3f} in bf16, apart {apart}")
    assert max(apart) < 0.08 and eight < sixteen
