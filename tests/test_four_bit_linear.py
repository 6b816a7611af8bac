"""4-bit linears whose weights are given back by one operation, against bitsandbytes' own."""

import pytest
import torch
from bitsandbytes import nn as bitsandbytes
from conftest import short_fields
from functorch.compile import make_boxed_func
from packed_training import (
    FOUR_BITS,
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    with_trained_lora,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from triton.errors import TritonError

from sftlab.fastpath import four_bit_linear
from sftlab.fastpath.four_bit_layers import four_bit_linears, swap, take_four_bits
from sftlab.fastpath.selection import FastPath

OURS, BITSANDBYTES = "sftlab.four_bit_weight", "bitsandbytes.gemm_4bit"


@pytest.fixture
def taken_on_a_cpu(monkeypatch):
    """The operation is taken on a CPU too, where it is made of bitsandbytes' operations."""
    monkeypatch.setattr(four_bit_linear, "has_kernels", lambda x: True)


class Ran(TorchDispatchMode):
    """Which operators gave 4-bit weights back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith((OURS, BITSANDBYTES)):
            self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()


def linear(dtype=torch.float32, nested=True, kind="nf4", was=None, **kwargs):
    torch.manual_seed(0)
    made = bitsandbytes.Linear4bit(
        128, 96, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type=kind
    )
    made = made.to(was or dtype).to("cpu")
    for name, value in kwargs.items():
        setattr(made, name, value)
    return made


def linear_with(packed=None, **changes):
    """A linear whose state has other values; `packed` cuts its weight to so many bytes."""
    layer = linear()
    vars(layer.weight.quant_state).update(changes)
    if packed:
        layer.weight.data = layer.weight.data[:packed]
    return layer


def product(layer, x, gradient):
    mine = x.clone().requires_grad_()
    with Ran() as ran:
        y = layer(mine)
        y.backward(gradient)
    return y.detach(), mine.grad, ran.names


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested, kind", [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_outputs_and_gradients_are_bitsandbytes_own(taken_on_a_cpu, nested, kind, asked, was):
    """`asked` is the input's dtype, `was` the weight's before it was rounded to 4 bits."""
    layer = linear(torch.bfloat16, nested, kind, was)
    x, gradient = torch.randn(2, 50, 128).to(asked), torch.randn(2, 50, 96).to(asked)
    y, into_x, names = product(layer, x, gradient)
    assert names == [BITSANDBYTES]
    assert swap([layer], torch.bfloat16) == {}
    mine, into_mine, names = product(layer, x, gradient)
    assert names == [OURS, OURS], "in the forward, and again in the backward"
    assert mine.dtype == asked and torch.equal(mine, y)
    assert into_mine.dtype == asked and torch.equal(into_mine, into_x)


def test_without_a_gradient_bitsandbytes_own_forward_runs(taken_on_a_cpu):
    layer, x = linear(), torch.randn(3, 128, requires_grad=True)
    assert swap([layer], torch.float32) == {}
    for given, enabled in ((x.detach(), True), (x, False)):
        with Ran() as ran, torch.set_grad_enabled(enabled):
            layer(given)
        assert ran.names == [BITSANDBYTES]
    with Ran() as ran:
        assert layer(x[:0]).shape == (0, 96)
    assert OURS not in ran.names
    state = layer.weight.quant_state
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP gives it
    with Ran() as ran:
        layer(x)
    assert ran.names == [BITSANDBYTES] and layer.weight.quant_state is state


class Graphs:
    """A backend that runs what torch.compile makes as it is, and keeps its graphs."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(
            fw_compiler=lambda graph, inputs: self.keep(self.forward, graph),
            bw_compiler=lambda graph, inputs: self.keep(self.backward, graph),
            partition_fn=min_cut_rematerialization_partition,
        )

    def take_compile(self, monkeypatch, compile_=torch.compile):
        """Let whatever is compiled from now on come here, whole."""
        torch._dynamo.reset()
        into = {"backend": self.backend, "fullgraph": True}
        monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, **into))

    def keep(self, graphs, graph):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    def count(self, name):
        """How often an operator stands in forwards and backwards."""
        return [
            sum(str(node.target).startswith(name) for graph in graphs for node in graph.nodes)
            for graphs in (self.forward, self.backward)
        ]

    def kept(self, made=False):
        """Sizes, smallest first, of what the forwards return and keep for the backwards.

        With `made` of these alone that are not inputs.
        """
        outputs = [node for graph in self.forward for node in graph.nodes if node.op == "output"]
        nodes = [one for node in outputs for one in node.args[0] if one is not None]
        values = [one.meta["val"] for one in nodes if not made or one.op != "placeholder"]
        return [tuple(sorted(one.shape)) for one in values if isinstance(one, torch.Tensor)]


def test_compiled_it_is_one_graph_that_keeps_no_whole_weight(taken_on_a_cpu):
    layer, graphs = linear(torch.bfloat16), Graphs()
    assert swap([layer], torch.bfloat16) == {}
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=graphs.backend, fullgraph=True)
    x, gradient = torch.randn(7, 128).bfloat16(), torch.randn(7, 96).bfloat16()
    y, into_x, _ = product(layer, x, gradient)
    mine = x.clone().requires_grad_()
    found = compiled(mine)
    found.backward(gradient)
    assert torch.equal(found, y) and torch.equal(mine.grad, into_x)
    assert graphs.count(OURS) == [1, 1]
    assert len(graphs.kept()) > 1 and (96, 128) not in graphs.kept()


NOT_TAKEN = {
    "compute in torch.float16": lambda: linear(torch.float16),
    "has a bias": lambda: linear(bias=torch.nn.Parameter(torch.zeros(96))),
    "has a forward of its own": lambda: linear(forward=lambda x: x),
    "af4 in blocks of 64 is unknown": lambda: linear_with(quant_type="af4"),
    "scales are not in float32": lambda: linear_with(offset=torch.zeros((), dtype=torch.float64)),
    "scales are rounded in another way": lambda: linear_with(absmax=torch.zeros(192)),
    "is no multiple of 8": lambda: linear_with(shape=torch.Size((96, 128)), packed=100),
    "no frozen ones with scales": lambda: linear(weight=torch.nn.Parameter(torch.zeros(96, 128))),
    "another order": lambda: linear(in_features=64),
}


@pytest.mark.parametrize("reason", NOT_TAKEN)
def test_a_linear_that_is_not_understood_keeps_its_forward(taken_on_a_cpu, reason):
    layer = NOT_TAKEN[reason]()
    ((why, count),) = swap([layer], torch.float32).items()
    assert count == 1 and reason in why
    assert type(layer) is bitsandbytes.Linear4bit


def test_weights_on_a_cpu_are_left_to_bitsandbytes():
    assert swap([linear(), linear()], torch.float32) == {"the weights are on the cpu": 2}


def test_weights_that_differ_are_left_to_bitsandbytes_and_counted(taken_on_a_cpu, monkeypatch):
    own = four_bit_linear.four_bit_weight

    def other(*args):
        weight = own(*args)
        weight.view(-1)[:7].add_(1)
        return weight

    monkeypatch.setattr(four_bit_linear, "four_bit_weight", other)
    layer = linear()
    assert swap([layer], torch.float32) == {"7 of 12,288 weights are not bitsandbytes'": 1}
    assert type(layer) is bitsandbytes.Linear4bit


@pytest.mark.parametrize("error", [RuntimeError("no\nroom"), TritonError("no\nroom")], ids=repr)
def test_a_kernel_that_does_not_run_here_is_left_to_bitsandbytes(
    taken_on_a_cpu, monkeypatch, error
):
    def fails(*args):
        raise error

    monkeypatch.setattr(four_bit_linear, "four_bit_weight", fails)
    layer = linear()
    assert swap([layer], torch.float32) == {"the kernel does not run here: no room": 1}
    assert type(layer) is bitsandbytes.Linear4bit


@pytest.mark.parametrize("name", ["outputs", "gradients"])
def test_products_that_differ_are_left_to_bitsandbytes_with_the_figure(
    taken_on_a_cpu, monkeypatch, name
):
    def other(ctx, *args):
        found = own(ctx, *args)
        return 1.01 * found if name == "outputs" else (1.01 * found[0], *found[1:])

    method = "forward" if name == "outputs" else "backward"
    own = getattr(four_bit_linear._Product, method)
    monkeypatch.setattr(four_bit_linear._Product, method, staticmethod(other))
    layers = [linear(), linear()]
    assert swap(layers, torch.float32) == {f"{name} are 1.0e-02 from bitsandbytes'": 2}
    assert {type(one) for one in layers} == {bitsandbytes.Linear4bit}


@pytest.fixture
def fields(base, rows, tmp_path, monkeypatch):
    pack_on_a_cpu(monkeypatch, reference_attention)
    # any size of tokens takes twice as long to trace as one size
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    short = short_fields(base, rows, tmp_path / "run") | FOUR_BITS
    return {**short, "packing": "true", "lora_dropout": "0", "overwrite": "true"}


def test_a_training_takes_it_where_layers_are_compiled_and_is_bitsandbytes_own(fields, monkeypatch):
    found = {}
    for taken in (False, True):
        graphs = Graphs()
        graphs.take_compile(monkeypatch)
        monkeypatch.setattr(four_bit_linear, "has_kernels", lambda x, taken=taken: taken)
        trainer = with_trained_lora(build(fields, compile_layers="true"))
        names = list(trainer.model.state_dict())
        nats, gradients = losses_and_gradients(trainer, examples(5))
        found[taken] = (nats, gradients, names, len(graphs.forward))
        linears = four_bit_linears(trainer.model)
        by = "one kernel" if taken else "bitsandbytes"
        assert trainer.what_ran()["four_bit_weights"] == by
        why = f"for {len(linears)} of {len(linears)} linears: the weights are on the cpu"
        assert trainer.fast.reasons.get("four_bit_kernel") == (None if taken else why)
        layers = trainer.model.config.num_hidden_layers
        of_a_layer = len(linears) // layers
        assert graphs.count(OURS) == ([of_a_layer, of_a_layer] if taken else [0, 0])
        assert graphs.count(BITSANDBYTES) == ([0, 0] if taken else [of_a_layer, 0])
    (nats, gradients, *facts), (mine, own, *own_facts) = found.values()
    assert facts == own_facts and facts[1] == 2, "all layers are one graph, the last norm another"
    assert torch.equal(mine, nats)
    for name, gradient in gradients.items():
        assert gradient.any() and torch.equal(own[name], gradient), name


@pytest.mark.parametrize("compiled, strategy", [(False, "single"), (True, "fsdp")])
def test_it_is_left_off_uncompiled_and_under_fsdp(taken_on_a_cpu, compiled, strategy):
    fast = FastPath(True, compiled, True, None, None)
    model = torch.nn.Sequential(linear(), torch.nn.Linear(96, 4))
    take_four_bits(model, fast, strategy, torch.float32)
    assert fast.four_bit_weights == "bitsandbytes"
    gathered = "for 1 of 1 linears: FSDP gathers the weights without their scales"
    assert fast.reasons == ({"four_bit_kernel": gathered} if compiled else {})
    assert type(model[0]) is bitsandbytes.Linear4bit
    whole = FastPath(True, True, True, None, None)
    take_four_bits(model[1:], whole, "single", torch.float32)
    assert whole.four_bit_weights is None and not whole.reasons
