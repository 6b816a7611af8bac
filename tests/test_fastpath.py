"""The fast path trains the same model: packed rows, fused loss and compiled layers against rows
padded one by one.

Everything here runs on a CPU in float32, with plain attention under a block mask in place of the
CUDA kernels; those are held to plain attention in tests/test_kernels.py.
"""

import dataclasses
import sys
import threading
import types

import pytest
import torch
from conftest import arguments, read, short_fields
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data import collator
from sftlab.data.chat_template import set_template
from sftlab.data.collator import TILE
from sftlab.data.samplers import BalancedSampler
from sftlab.data.splits import load_splits
from sftlab.fastpath import compile_layers, fused_loss, kernel_warmup, selection, varlen_attention
from sftlab.fastpath.float8 import FrozenFloat8Linear, freeze_in_float8
from sftlab.measurement.flops import flops_per_token
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.training.trainer import LabTrainer, build_trainer


def reference_attention(query, key, value, table, scale):
    """[tokens, heads, size] under the mask that `tiles` stands for."""
    tokens, groups = query.shape[0], query.shape[1] // key.shape[1]
    pieces = table[0]
    at = torch.arange(tokens)[:, None]
    owned = (at >= pieces[:, 2]) & (at < torch.minimum(pieces[:, 2] + TILE, pieces[:, 1]))
    start = (owned * pieces[:, 0]).sum(dim=1)
    seen = (at >= at.T) & (start[:, None] == start[None])
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    return scaled_dot_product_attention(query, key, value, seen, scale=scale).transpose(0, 1), None


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let packing run here, with the reference attention."""
    monkeypatch.setattr(varlen_attention, "why_not", lambda config, model_class: None)
    monkeypatch.setattr(varlen_attention, "varlen_attention", reference_attention)


def build(fields: dict[str, str], **more: object) -> LabTrainer:
    """The trainer as recipes/sft.py builds it."""
    launch = Launch.from_environment()
    recipe = parse_recipe(arguments({**fields, **{k: str(v) for k, v in more.items()}}), launch)
    model, args = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, args)
    set_template(tokenizer, args.chat_template_path)
    config = load_config(model.model_name_or_path, model.model_revision, args)
    fast = selection.choose(recipe, config, launch)
    args.disable_tqdm, args.report_to = True, []
    return build_trainer(recipe, launch, fast, tokenizer, load_splits(recipe.data))


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "per_device_train_batch_size": "4", "lora_dropout": "0"}


def examples(count: int, longest: int = 90) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        ids = torch.randint(0, 255, (length,), generator=generator).tolist()
        cut = int(torch.randint(1, length - 1, (1,), generator=generator))
        found.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return found


def losses_and_gradients(
    trainer: LabTrainer, rows: list[dict]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = trainer.model.train()
    model.zero_grad()
    nats = trainer.token_losses(model, trainer._prepare_inputs(trainer.data_collator(rows)))[0]
    nats.sum().backward()
    return nats.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def with_trained_lora(trainer: LabTrainer) -> LabTrainer:
    """LoRA's B is zero at the start, which would leave A without a gradient."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def test_packed_and_fused_gives_the_losses_and_gradients_of_rows_padded_one_by_one(
    fields, on_a_cpu
):
    fast = with_trained_lora(build(fields, packing="true", fused_loss="true"))
    plain = with_trained_lora(build(fields, packing="false", fused_loss="false"))
    assert (fast.fast.packing, fast.fast.fused_loss) == (True, True)
    assert (plain.fast.packing, plain.fast.fused_loss) == (False, False)
    rows = examples(7)
    nats, gradients = losses_and_gradients(fast, rows)
    alone = [losses_and_gradients(plain, [row]) for row in rows]
    torch.testing.assert_close(nats, torch.cat([n for n, _ in alone]), atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        expected = sum(g[name] for _, g in alone)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99999


@pytest.mark.parametrize(("packing", "filled_to"), [("true", 384), ("false", 96)])
def test_batches_are_filled_up_to_the_multiple_that_is_asked_for(
    fields, on_a_cpu, packing, filled_to
):
    rows = examples(7)
    trainers = [build(fields, packing=packing, **more) for more in ({}, {"pad_to_multiple_of": 96})]
    assert trainers[1].data_collator(rows)["input_ids"].shape[1] % filled_to == 0
    usual, filled = (
        losses_and_gradients(with_trained_lora(trainer), rows)[0] for trainer in trainers
    )
    torch.testing.assert_close(usual, filled, atol=1e-5, rtol=0)


def test_a_packed_row_does_not_see_its_neighbours(fields, on_a_cpu):
    trainer = with_trained_lora(build(fields, packing="true"))
    rows = examples(5)
    before = losses_and_gradients(trainer, rows)[0]
    changed = [dict(row) for row in rows]
    changed[2]["input_ids"] = [(i + 1) % 255 for i in rows[2]["input_ids"]]
    changed[2]["labels"] = [
        -100 if label == -100 else (label + 1) % 255 for label in rows[2]["labels"]
    ]
    after = losses_and_gradients(trainer, changed)[0]
    row = trainer.data_collator(rows)["loss_rows"]
    torch.testing.assert_close(after[row != 2], before[row != 2], atol=1e-6, rtol=0)
    assert (after[row == 2] - before[row == 2]).abs().max() > 1e-3


def train(trainer: LabTrainer, **kwargs: object) -> list[dict]:
    trainer.train(**kwargs)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "more", [{}, {"per_device_train_batch_size": 2, "gradient_checkpointing": "true"}]
)
def test_training_packed_follows_the_plain_curve(fields, on_a_cpu, more):
    curves = {}
    for name, switch in (("fast", "true"), ("plain", "false")):
        trainer = build(
            fields, packing=switch, fused_loss=switch, eval_strategy="steps", eval_steps=3, **more
        )
        curves[name] = train(trainer)
        curves[f"{name} held out"] = [
            e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e
        ]
        assert trainer.validation_loss() == pytest.approx(curves[f"{name} held out"][-1], abs=1e-6)
    for fast, plain in zip(curves["fast"], curves["plain"], strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert fast[key] == pytest.approx(plain[key], abs=2e-4), key
        # trl's are means of the micro-batches' means
        for key in ("mean_token_accuracy", "entropy"):
            assert fast[key] == pytest.approx(plain[key], abs=0.02), key
    assert curves["fast held out"] == pytest.approx(curves["plain held out"], abs=1e-5)
    assert len(curves["fast held out"]) == 2


def test_the_loss_of_an_evaluation_is_the_corpus_s_and_does_not_depend_on_the_batch(fields):
    found = []
    for size in (1, 3, 8):
        trainer = with_trained_lora(build(fields, per_device_eval_batch_size=size))
        found.append(trainer.evaluate()["eval_loss"])
        assert trainer.validation_loss() == pytest.approx(found[-1], abs=1e-9)
    nats = [losses_and_gradients(trainer, [row])[0] for row in trainer.eval_dataset]
    exact = sum(n.sum().item() for n in nats) / sum(map(len, nats))
    assert found == pytest.approx([exact] * 3, abs=2e-6)


class Costs(TorchDispatchMode):
    """What a step asks of the device:

    results read back by the host, and the largest tensor over the vocabulary.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.reads, self.largest_logits = words, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if any(op in name for op in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.reads.append(name)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.ndim > 1
                and tensor.shape[-1] == self.words
            ):
                self.largest_logits = max(self.largest_logits, tensor.numel() // self.words)
        return result


def test_a_step_reads_nothing_back_and_holds_one_chunk_of_logits(fields, on_a_cpu, monkeypatch):
    monkeypatch.setattr(fused_loss, "CHUNK", 50)
    costs = {}
    for name, switch in (("fast", "true"), ("trl", "false")):
        trainer = build(fields, packing=switch, fused_loss=switch, logging_steps=100)
        costs[name] = Costs(words=259)
        step = trainer.training_step

        def counted(*args, step=step, seen=costs[name], **kwargs):
            with seen:
                return step(*args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", counted)
        trainer.train()
    assert costs["fast"].reads == []
    assert costs["fast"].largest_logits == 50
    assert len(costs["trl"].reads) >= 6 * 2 * 2, (
        "the count sees what trl reads: two metrics a micro-batch"
    )


def test_compiled_layers_are_one_graph_that_batches_of_other_sizes_do_not_compile_anew(
    fields, on_a_cpu, monkeypatch
):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **kwargs: compile_(f, backend=compiler, fullgraph=True, **kwargs),
    )
    torch._dynamo.reset()
    compiled = train(build(fields, packing="true", compile_layers="true"))
    found = len(graphs)
    torch._dynamo.reset()
    assert found == 2, "all layers, and the last norm"
    plain = train(build(fields, packing="true", compile_layers="false"))
    assert [e["loss"] for e in compiled] == pytest.approx([e["loss"] for e in plain], abs=1e-5)


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

    def attention_forward(query, key, value, pieces, scale):
        called.setdefault("forward", set()).add(
            form(query, key, value, pieces[0], pieces[1], scale)
        )
        return torch.zeros_like(query), query.new_zeros(
            query.shape[1], query.shape[0], dtype=torch.float32
        )

    def attention_backward(gradient, query, key, value, output, lse, pieces, scale):
        tensors = (gradient, query, key, value, output, lse[0])
        called.setdefault("backward", set()).add(form(*tensors, pieces[0], pieces[1], scale))
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
    monkeypatch.setattr(varlen_attention, "why_not", lambda config, model_class: None)
    monkeypatch.setattr(fused_loss, "cross_entropy_", cross_entropy_)
    trainer = build(fields, packing="true")
    for weight in trainer.model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.to(weights)
    kernel_warmup.rehearse(trainer.model.config, dtype, torch.device("cpu"), fused_loss=True)
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


def test_kernels_are_rehearsed_on_the_gpu_of_the_process(fields, monkeypatch):
    done = []
    note = lambda what: lambda *given: done.append((threading.current_thread().name, what, *given))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(kernel_warmup, "rehearse", note("rehearsed"))
    recipe = parse_recipe(arguments(fields), Launch.from_environment())
    config = load_config(recipe.model.model_name_or_path, None, recipe.training)
    fast = selection.FastPath(
        packing=True, compile_layers=False, fused_loss=None, attn_implementation=None
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert kernel_warmup.start_compilers(recipe, config, fast).exception(20) is None
    gpu = torch.device("cuda", 1)
    assert done == [
        ("rehearsal_0", "device", gpu),
        ("rehearsal_0", "rehearsed", config, torch.float32, gpu, True),
    ]
    recipe.training.dataset_num_proc = 2
    assert kernel_warmup.start_compilers(recipe, config, fast).done() and len(done) == 2, (
        "tokenizing forks"
    )


FOUR_BITS = {"load_in_4bit": "true", "use_bnb_nested_quant": "true", "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"load_in_8bit": "true"}


@pytest.mark.parametrize(
    "dropped", [{}, {"gradient_checkpointing": "true"}], ids=["kept", "checkpointed"]
)
@pytest.mark.parametrize("weights", ["whole", "float8", "4 bits", "4 bits gathered"])
def test_compiled_layers_have_the_gradients_of_uncompiled_ones(
    fields, on_a_cpu, monkeypatch, weights, dropped
):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_(f, backend="aot_eager", **kwargs)
    )
    more = dropped | (FOUR_BITS if "4 bits" in weights else {})
    found = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        torch._dynamo.reset()
        trainer = with_trained_lora(build(fields, packing="true", compile_layers="false", **more))
        if weights == "float8":
            freeze_in_float8(trainer.model)
        if weights == "4 bits gathered":  # FSDP gives them back as plain parameters
            for linear in (m for m in trainer.model.modules() if "quant_state" in vars(m)):
                linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
        if compiled:
            compile_layers.compile_layers(trainer.model.get_base_model())
        with torch.autocast("cpu", torch.bfloat16, enabled=weights != "whole"):
            found.append(losses_and_gradients(trainer, examples(5)))
    assert not torch._dynamo.utils.counters["graph_break"]
    (nats, gradients), (nats_compiled, gradients_compiled) = found
    rounding = {"whole": 1e-6, "float8": 0.03}.get(weights, 0.01)
    assert (nats_compiled - nats).abs().mean() < rounding
    for name, gradient in gradients.items():
        pair = (gradient.flatten().double(), gradients_compiled[name].flatten().double())
        assert torch.cosine_similarity(*pair, dim=0) > 1 - rounding, name


@pytest.mark.parametrize("micro_batch, processes", [(4, 1), (2, 1), (2, 2)])
def test_a_step_has_the_rows_of_the_plain_order_dealt_evenly(micro_batch, processes):
    lengths = torch.randint(16, 513, (83,), generator=torch.Generator().manual_seed(0)).tolist()
    order = torch.randperm(83, generator=torch.Generator().manual_seed(1)).tolist()[:80]
    dealt = list(BalancedSampler(order, lengths, micro_batch, 8 // micro_batch))
    assert sorted(dealt) == sorted(order)
    for step in range(0, 80, 8):
        assert sorted(dealt[step : step + 8]) == sorted(order[step : step + 8])
        micro_batches = [dealt[i : i + micro_batch] for i in range(step, step + 8, micro_batch)]
        tokens = [sum(lengths[row] for row in rows) for rows in micro_batches]
        assert max(tokens) - min(tokens) <= 512
    plain = sum(abs(_spread(order[i : i + 8], lengths, micro_batch)) for i in range(0, 80, 8))
    even = sum(abs(_spread(dealt[i : i + 8], lengths, micro_batch)) for i in range(0, 80, 8))
    assert even < plain / 2


def _spread(rows: list[int], lengths: list[int], size: int) -> int:
    tokens = [sum(lengths[row] for row in rows[i : i + size]) for i in range(0, len(rows), size)]
    return max(tokens) - min(tokens) if len(tokens) > 1 else len(rows) * 0


def test_a_packed_run_goes_on_in_the_middle_of_an_epoch_as_if_nothing_had_happened(
    fields, on_a_cpu
):
    more = {
        "packing": "true",
        "num_train_epochs": 2,
        "max_steps": -1,
        "lora_dropout": 0.1,
        "save_steps": 29,
    }
    more |= {"global_batch_size": 8, "eval_strategy": "no"}
    undisturbed = build(fields, **more)
    steps = train(undisturbed)
    checkpoint = f"{undisturbed.args.output_dir}/checkpoint-29"
    again = build(fields, **more, overwrite="true")
    assert 29 % (len(steps) // 2), "the checkpoint lies inside an epoch"
    continued = train(again, resume_from_checkpoint=checkpoint)
    assert [e["loss"] for e in continued] == [e["loss"] for e in steps]
    for (name, parameter), other in zip(
        undisturbed.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("lengths", [[64], [65], [200, 3, 64], [64, 64, 64, 64], [1, 0]])
def test_tables_of_tiles_cover_every_token_once_and_are_aligned(lengths):
    table = collator.tiles(lengths)
    assert table.shape[1] * 3 * 4 % 16 == 0, "Triton would compile the backward for both alignments"
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for half in table.tolist():
        seen = [at for start, end, first in half for at in range(first, min(first + TILE, end))]
        assert sorted(seen) == list(range(sum(lengths)))
        assert all(end in ends for _, end, _ in half)
        assert all(first >= end for _, end, first in half[sum(-(-n // TILE) for n in lengths) :]), (
            "empty ones last"
        )


def test_the_loss_does_not_depend_on_the_chunk(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(90, 16), torch.randn(37, 16)
    positions, targets = torch.randperm(90)[:50], torch.randint(0, 37, (50,))
    found = []
    for chunk in (7, 4096):
        monkeypatch.setattr(fused_loss, "CHUNK", chunk)
        mine = hidden.clone().requires_grad_()
        nats, entropies, hits = fused_loss.FrozenHeadLoss.apply(mine, weight, positions, targets)
        (nats * torch.arange(50.0)).sum().backward()
        found.append((nats, entropies, hits, mine.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    exact = hidden.clone().requires_grad_()
    log_probs = (exact[positions] @ weight.T).log_softmax(-1)
    (-log_probs.gather(1, targets[:, None])[:, 0] * torch.arange(50.0)).sum().backward()
    nats, entropies, hits, gradient = found[0]
    torch.testing.assert_close(gradient, exact.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(nats, -log_probs.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(log_probs.exp() * log_probs).sum(-1))
    assert torch.equal(hits.bool(), log_probs.argmax(-1) == targets)


def test_where_packing_cannot_be_had_rows_are_padded_and_the_run_says_why(finished):
    run = read(finished[0])
    assert (run["ran"]["packing"], run["ran"]["compile_layers"], run["ran"]["fused_loss"]) == (
        False,
        False,
        True,
    )
    assert finished[2].stdout.count("packing is off: a CPU has no variable-length attention") == 1
    assert "non_blocking" not in finished[2].stderr, "a setting for GPUs warns on a CPU"


@pytest.mark.parametrize(
    "asked, named",
    [
        (
            {"packing": "true"},
            "packing is not possible here: a CPU has no variable-length attention",
        ),
        ({"attn_implementation": "varlen"}, "a CPU has no variable-length attention"),
        (
            {"packing": "true", "attn_implementation": "sdpa"},
            "attention sdpa would need a dense mask",
        ),
        ({"padding_free": "true"}, "padding_free is not used here: packing decides"),
        ({"packing_strategy": "bfd"}, "packing_strategy is not used here"),
        (
            {"fused_loss": "true", "label_smoothing_factor": "0.1"},
            "fused_loss is not possible here",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(fields, asked, named):
    with pytest.raises(ValueError, match=named):
        build(fields, **asked)


@pytest.mark.parametrize(
    "strategy, asked, compiled",
    [
        ("fsdp", {}, True),
        ("fsdp", FOUR_BITS, True),
        ("fsdp", EIGHT_BITS, False),
        ("fsdp", EIGHT_BITS | {"compile_layers": "true"}, True),
        ("ddp", EIGHT_BITS, True),
    ],
)
def test_layers_of_8_bit_weights_are_not_compiled_under_fsdp(
    fields, on_a_cpu, monkeypatch, strategy, asked, compiled
):
    monkeypatch.setattr(varlen_attention, "no_triton", lambda: None)
    recipe = parse_recipe(arguments({**fields, **asked}), Launch.from_environment())
    fast = selection.choose(
        recipe, LlamaConfig(), dataclasses.replace(Launch.from_environment(), strategy=strategy)
    )
    assert (fast.packing, fast.fused_loss, fast.compile_layers) == (True, None, compiled)
    assert ("compile_layers" in fast.reasons) == (not compiled)


def test_a_head_that_changes_its_logits_keeps_trls_loss(fields, monkeypatch):
    monkeypatch.setattr(LlamaConfig, "logit_scale", 2.0, raising=False)
    trainer = build(fields)
    assert trainer.fast.fused_loss is False
    assert trainer.fast.reasons["fused_loss"] == "llama changes its logits (logit_scale)"
    assert train(trainer)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"head_dim": 24}, "the heads have size 24"),
        ({"sliding_window": 64}, "a sliding window"),
        ({"attn_logit_softcapping": 30.0}, "capped scores"),
        ({"attention_dropout": 0.1}, "dropout in its attention"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layers other than full attention",
        ),
    ],
)
def test_models_whose_attention_the_kernels_do_not_have_are_not_packed(monkeypatch, change, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(varlen_attention, "find_spec", lambda name: name)
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    assert varlen_attention.why_not(config, LlamaForCausalLM) is None
    for name, value in change.items():
        setattr(config, name, value)
    assert why in varlen_attention.why_not(config, LlamaForCausalLM)
    assert "does not take another attention" in varlen_attention.why_not(
        LlamaConfig(hidden_size=64, num_attention_heads=2), None
    )


def test_a_parameter_that_something_unfroze_stops_the_run(fields, on_a_cpu):
    class Unfreeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.get_input_embeddings().weight.requires_grad_(True)

    trainer = build(fields)
    trainer.add_callback(Unfreeze())
    with pytest.raises(
        RuntimeError, match=r"1 parameters have gradients and no optimizer, .*embed_tokens"
    ):
        train(trainer)


def test_frozen_float8_linears_are_near_the_linears_they_replace():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    x, gradient = torch.randn(32, 64).bfloat16(), torch.randn(32, 48).bfloat16()
    found = []
    for layer in (linear, FrozenFloat8Linear(linear)):
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.backward(gradient)
        found.append((y.detach(), mine.grad))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (
            torch.cosine_similarity(exact.flatten().float(), rounded.flatten().float(), dim=0)
            > 0.998
        )


def test_fp8_freezes_the_decoders_linears_and_no_others():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "down_proj"])
    )
    before = flops_per_token(model)
    assert freeze_in_float8(model) == 7
    kept = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and type(m) is torch.nn.Linear
    ]
    assert all("lora_" in name or "lm_head" in name for name in kept)
    assert flops_per_token(model) == before
    saved = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(LlamaForCausalLM(config), saved)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze_in_float8(model)
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == trained
    with pytest.raises(ValueError, match="no frozen linear whose sizes are multiples of 16"):
        freeze_in_float8(torch.nn.Linear(8, 8))
