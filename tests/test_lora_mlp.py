"""An MLP with fused LoRA as one function computes what peft's layers do, and keeps less."""

import sys
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_lora_products import ALL, SIZES, adapted, compiled, difference, loss_and_gradients
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config
from triton_interpreter import with_triton

from sftlab import fastpath
from sftlab.fastpath import fused_lora, lora_mlp, mlp_ops
from sftlab.fastpath.fused_lora import fuse_lora
from sftlab.fastpath.lora_mlp import LoraMlp

CONFIGS = {  # Gemma's activation is the tanh form of GELU; Qwen3 has norms of queries and keys
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16, pad_token_id=0),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def build(config: object = CONFIGS["llama"], fused: bool = True, **fields: object) -> PeftModel:
    """A small float64 model whose B is not zero."""
    torch.manual_seed(0)
    lora = LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": ALL} | fields)
    found = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    for name, parameter in found.named_parameters():
        if "lora_B" in name or name.endswith("base_layer.bias"):
            nn.init.normal_(parameter, std=0.1)
    found = found.double().train()
    if fused:
        assert fuse_lora(found, torch.float64) == {}
    return found


def mlp(model: PeftModel) -> nn.Module:
    return model.get_base_model().model.layers[0].mlp


@pytest.fixture
def whole(monkeypatch) -> list[int]:
    """Has an entry, its rows, for every MLP that was computed as one function."""
    found = []
    plain = lora_mlp.gated_down

    def gated_down(y, *rest):
        found.append(len(y))
        return plain(y, *rest)

    monkeypatch.setattr(lora_mlp, "gated_down", gated_down)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "r": 20}], ids=str)
def test_losses_and_gradients_are_pefts(config, fields, whole):
    plain = loss_and_gradients(build(config, False, **fields))
    assert whole == []
    assert difference(plain, loss_and_gradients(build(config, **fields))) < 1e-6
    assert whole == [100, 100]


def output_and_gradients(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 9, 64, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.randn(2, 9, 64, dtype=torch.float64).to(dtype)
    output = module(x)
    (output * weights).sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("config", ["llama", "gemma"])
@pytest.mark.parametrize(
    "dtype, most", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_the_output_and_every_gradient_are_pefts(config, dtype, most, whole):
    plain, mine = build(CONFIGS[config], False), build(CONFIGS[config])
    for model in (plain, mine):
        model(torch.zeros(1, 8, dtype=torch.long))  # the decoder's forward copies A and B
    exact = output_and_gradients(mlp(plain), torch.float64)
    plain, mine = (build(CONFIGS[config], False).to(dtype) for _ in range(2))
    assert fuse_lora(mine, dtype) == {}
    mine(torch.zeros(1, 8, dtype=torch.long))
    del whole[:]
    found = output_and_gradients(mlp(mine), dtype)
    assert whole == [18]
    assert difference(exact, found) < most
    peft = difference(exact, output_and_gradients(mlp(plain), dtype))
    assert difference(exact, found) < 1.5 * peft or dtype == torch.float64


@pytest.mark.long
@pytest.mark.parametrize("config", ["gemma", "qwen3"])
def test_compiled_layers_of_any_number_of_tokens_are_what_pefts_are(config, monkeypatch):
    plain, mine = build(CONFIGS[config], False), compiled(build(CONFIGS[config]), monkeypatch)
    for tokens in (50, 70):
        found = [loss_and_gradients(model, tokens) for model in (plain, mine)]
        assert difference(*found) < 1e-6
    with torch.profiler.profile() as profile:
        loss_and_gradients(mine, 90)
    done = {event.name for event in profile.events()}
    assert done >= {"sftlab::gated_down", "sftlab::gated_backward", "sftlab::beside"}


def kept(model: PeftModel) -> int:
    """Bytes of the tensors that autograd keeps for the backward, without parameters."""
    model(torch.zeros(1, 8, dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 50, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = mlp(model)(x)
    assert output.shape == x.shape
    return sum(found.values())


def test_it_keeps_its_input_and_the_outputs_of_gate_and_up_and_no_activation(monkeypatch):
    mine = kept(build())
    monkeypatch.setattr(fused_lora, "fuse_mlp", lambda module: None)
    without = kept(build())
    assert mine == 8 * 50 * (64 + 64 + 2 * 96 + 64)
    assert without - mine >= 8 * 50 * 96, "the activation, at least"


def with_hook(model: PeftModel) -> None:
    seen = []
    mlp(model).gate_proj.register_forward_hook(lambda *_: seen.append(1))
    model.seen = seen


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "disabled": lambda model: mlp(model).up_proj.enable_adapters(False),
    "merged": lambda model: mlp(model).down_proj.merge(),
    "hook": with_hook,
    "before": lambda m: mlp(m).act_fn.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "within": lambda m: mlp(m).down_proj.base_layer.register_forward_hook(lambda *a: a[2] + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_layer_later_is_done_as_without_it(change, whole):
    plain, mine = build(fused=False), build()
    loss_and_gradients(mine)
    del whole[:]
    for model in (plain, mine):
        CHANGES[change](model)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(mine(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)
    assert whole == [40], "the second layer alone"
    if change == "hook":
        assert mine.seen == plain.seen == [1]


def test_dropout_in_force_is_done_linear_by_linear(whole):
    model = build(lora_dropout=0.3)
    loss_and_gradients(model)
    assert whole == []
    plain = loss_and_gradients(build(fused=False, lora_dropout=0.3).eval())
    assert difference(plain, loss_and_gradients(model.eval())) < 1e-6
    assert whole == [100, 100]


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "relu"},
        {"mlp_bias": True},
        {"targets": ["gate_proj", "up_proj"]},
        {"targets": ["gate_proj", "down_proj"]},
        {"rank_pattern": {"up_proj": 4}},
        {"r": 72},
    ],
    ids=str,
)
def test_what_is_not_known_is_done_linear_by_linear(fields, whole):
    known = {"hidden_act", "mlp_bias"}
    config = LlamaConfig(**SIZES, **{k: v for k, v in fields.items() if k in known})
    more = {k: v for k, v in fields.items() if k not in known}
    more["target_modules"] = more.pop("targets", ALL)
    mine, plain = build(config, **more), build(config, False, **more)
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) < 1e-6
    assert whole == []


def test_a_forward_of_another_kind_is_left_alone(monkeypatch):
    of = type(mlp(build(fused=False)))

    def scaled(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.config.times

    for forward in (scaled, lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)))):
        monkeypatch.setattr(of, "forward", forward)
        assert not isinstance(mlp(build()), LoraMlp)
    monkeypatch.undo()
    assert isinstance(mlp(build()), LoraMlp)


def test_merged_for_good_it_is_the_models_own(whole):
    ids, model = torch.arange(40)[None], adapted()
    tuned = model(ids).logits
    fuse_lora(model, torch.float64)
    torch.testing.assert_close(model(ids).logits, tuned, atol=1e-5, rtol=0)
    assert whole == [40, 40]
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, tuned, atol=1e-5, rtol=0)
    assert whole == [40, 40]


class OfAGpu:
    """Stands for the activation of a few tokens on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, size: int = 128, bytes_each: int = 2, rows: int = 5) -> None:
        self.shape, self.bytes_each = (rows, size), bytes_each

    def __len__(self) -> int:
        return self.shape[0]

    def element_size(self) -> int:
        return self.bytes_each


@pytest.fixture
def hopper(monkeypatch) -> None:
    """A GPU of compute capability 9, and a Triton whose Gluon the kernels are for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(mlp_ops, "module_with_lora", lambda: "kernels")
    monkeypatch.setattr(mlp_ops, "is_hopper", mlp_ops.is_hopper.__wrapped__)


def test_thin_products_have_own_kernels_where_those_can_run(hopper, monkeypatch):
    assert mlp_ops.kernels_with_lora(OfAGpu(), 16) == "kernels"
    assert mlp_ops.kernels_with_lora(OfAGpu(size=192), 32) == "kernels"
    for y, rank in (
        (torch.zeros(5, 128, dtype=torch.bfloat16), 16),
        (OfAGpu(bytes_each=4), 16),
        (OfAGpu(size=96), 16),
        (OfAGpu(), 20),
        (OfAGpu(), 40),
        (OfAGpu(rows=0), 16),
    ):
        assert mlp_ops.kernels_with_lora(y, rank) is None
    for other in ((8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=other: of)
        assert mlp_ops.kernels_with_lora(OfAGpu(), 16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert mlp_ops.kernels_with_lora(OfAGpu(), 16) is None, "another maker's 9.x"


def test_a_run_can_leave_them_out(hopper):
    mlp_ops.let_kernels_have_lora(False)
    try:
        assert mlp_ops.kernels_with_lora(OfAGpu(), 16) is None
    finally:
        mlp_ops.let_kernels_have_lora(True)
    assert mlp_ops.kernels_with_lora(OfAGpu(), 16) == "kernels"


def test_an_mlp_says_whether_its_kernels_have_lora_in_them(monkeypatch):
    model, asked = build(r=16), []
    assert not mlp(model).kernels_have_lora, "a CPU"
    monkeypatch.setattr(
        lora_mlp, "kernels_with_lora", lambda y, rank: asked.append((y.shape, y.dtype, rank)) or 1
    )
    assert mlp(model).kernels_have_lora
    assert not mlp(build(r=16, lora_dropout=0.1)).kernels_have_lora, "linear by linear"
    assert asked == [((1, 96), torch.float64, 16)] * 2


@pytest.fixture
def looked_for_anew():
    """Whether Gluon is there is asked again."""
    mlp_ops.module_with_lora.cache_clear()
    yield
    mlp_ops.module_with_lora.cache_clear()


@pytest.mark.parametrize("lacks", ["triton", "triton.experimental.gluon"])
def test_without_gluon_thin_products_have_no_own_kernels(lacks, monkeypatch, looked_for_anew):
    monkeypatch.setitem(sys.modules, lacks, None)
    monkeypatch.delitem(sys.modules, "sftlab.fastpath.gated_lora_kernel", raising=False)
    monkeypatch.delattr(fastpath, "gated_lora_kernel", raising=False)
    assert mlp_ops.module_with_lora() is None


@with_triton
@pytest.mark.parametrize("version, known", [("3.7.9", True), ("3.8.0", False), ("4.6.0", False)])
def test_their_kernels_are_for_tritons_whose_gluon_is_known(
    version, known, monkeypatch, looked_for_anew
):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    assert (mlp_ops.module_with_lora() is not None) is known


class Recorded:
    """Stands for gated_lora_kernel.py, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked = []

    def gated_with_lora(self, y, a, rank, gelu, out):
        self.asked.append(("forward", rank))
        return y.new_zeros(len(y), len(a))

    def gated_backward_with_lora(self, *given):
        self.asked.append(("backward", *given[5:7]))
        return given[3], given[4]


@pytest.mark.parametrize(
    "rank, rank_down, done",
    [
        (16, 16, [("forward", 16), ("backward", 16, 16)]),
        (16, 8, [("forward", 8), ("backward", 16, 8)]),
        (16, 64, []),
        (64, 16, [("forward", 16)]),
    ],
)
def test_each_step_takes_them_where_they_are_for_the_ranks_in_it(
    rank, rank_down, done, monkeypatch
):
    kernels = Recorded()
    monkeypatch.setattr(
        mlp_ops,
        "kernels_with_lora",
        lambda y, of: kernels if mlp_ops.may_be_in_kernels(of) else None,
    )
    rows, size, ranks = 3, 64, 128
    y, act, h = (torch.randn(rows, n) for n in (2 * size, size, ranks))
    a, b = torch.randn(ranks, size), torch.randn(2 * size, ranks)
    mlp_ops.gated_beside(y, a, rank_down, False, torch.empty(rows, size + ranks))
    out = torch.empty(rows, 2 * size + ranks)
    mlp_ops.gated_backward_beside(act, y, h, b, h, rank, rank_down, False, out)
    assert kernels.asked == done


def test_the_steps_are_told_each_rank_in_its_place(monkeypatch):
    found = []
    for name in ("gated_down", "gated_backward"):
        plain = getattr(lora_mlp, name)
        monkeypatch.setattr(
            lora_mlp, name, lambda *of, plain=plain: (found.append(of[-3:-1]), plain(*of))[1]
        )
    model = build(rank_pattern={"down_proj": 4})
    loss_and_gradients(model)
    assert [of[-1] for of in found[:2]] == [4, 4], "down's rank, in the forward"
    assert found[2:] == [(8, 4), (8, 4)]


def test_on_a_cpu_an_mlps_steps_take_the_kernels_of_today(monkeypatch):
    done = []
    for name in ("gated", "gated_backward_"):
        plain = getattr(mlp_ops, name)
        monkeypatch.setattr(
            mlp_ops, name, lambda *given, of=plain, name=name: (done.append(name), of(*given))
        )
    rows, size, ranks = 3, 64, 64
    y, act, h = (torch.randn(rows, n) for n in (2 * size, size, ranks))
    mlp_ops.gated_beside(y, torch.randn(ranks, size), 16, False, torch.empty(rows, size + ranks))
    out = torch.empty(rows, 2 * size + ranks)
    b = torch.randn(2 * size, ranks)
    into_h, into_b, _ = mlp_ops.gated_backward_beside(act, y, h, b, h, 16, 16, False, out)
    assert done == ["gated", "gated_backward_"]
    assert torch.equal(out[:, 2 * size :], into_h)
    assert torch.allclose(into_b, out[:, : 2 * size].t() @ h)
