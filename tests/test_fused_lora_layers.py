"""The benchmark of fused LoRA times layers that compute the same, and says what failed."""

import subprocess

import pytest
import torch
from conftest import load_script
from triton_interpreter import interpret, with_triton

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import lora_mlp, mlp_ops
from sftlab.tables import read_csv

bench = load_script("benchmarks/fused_lora_layers.py")
kernels = load_script("benchmarks/fused_lora_kernels.py")
SHAPE = bench.Shape(64, 96, heads=4, key_heads=2, rank=8, device="cpu", dtype=torch.float32)
FUSED = [name for name in bench.VARIANTS if name != bench.PEFT]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """Times that need no GPU: of round n, a tenth of the place of the variant and 10 n."""
    places = list(bench.VARIANTS)
    monkeypatch.setattr(bench, "added_gb", lambda call: 0.5)
    monkeypatch.setattr(
        bench.Layers,
        "turn",
        lambda self, name, tokens, column: {column: int(column[6:]) * (places.index(name) + 1)},
    )


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_every_variant_gives_what_peft_gives(dtype, most):
    layers = bench.Layers(SHAPE._replace(dtype=dtype), {}, {})
    for name in bench.VARIANTS:
        found = layers.first_step(name, 330)
        assert float(found["difference"]) < most, name
    adapter = [one for leaf, one in layers.expected[330].items() if "lora_" in leaf]
    assert len(adapter) == 14
    assert {one.dtype for one in adapter} == {torch.float32}
    assert len(layers.decoders) == 5
    assert all(one.abs().max() > 0 for one in layers.step("fused", 330)().values())


def test_a_difference_from_peft_is_seen(monkeypatch):
    layers = bench.Layers(SHAPE, {}, {})
    layers.first_step(bench.PEFT, 20)
    plain = lora_mlp.adapter_gradients
    monkeypatch.setattr(lora_mlp, "adapter_gradients", lambda *of: [2 * g for g in plain(*of)])
    assert float(layers.first_step("fused", 20)["difference"]) == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(
        lora_mlp, "adapter_gradients", lambda *of: [g * float("nan") for g in plain(*of)]
    )
    assert layers.first_step("fused", 20)["difference"] == "nan"


def test_variants_are_what_their_names_say(monkeypatch):
    layers, done = bench.Layers(SHAPE, {}, {}), []

    def noted(name, plain):
        def call(*of):
            done.append(name)
            return plain(*of)

        return call

    for module, name in ((lora_mlp, "gated_down"), (mlp_ops, "beside")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    found = {}
    for name in reversed(bench.VARIANTS):
        layers.step(name, 20)()
        found[name] = done.copy()
        done.clear()
    assert found["peft"] == found["fused before"] == []
    assert found["fused"] == ["gated_down", "beside"]
    assert found["fused, the MLP alone"] == ["gated_down"]
    assert found["fused, the copy alone"] == ["beside"]


def test_the_table_has_ratios_of_the_same_round_and_says_what_failed(tmp_path, monkeypatch, capsys):
    plain = bench.build

    def build(variant, shape):
        if not variant.mlp and variant.copied:
            raise RuntimeError("no\nsuch kernel")
        return plain(variant, shape)

    monkeypatch.setattr(bench, "build", build)
    words = ["--parts", "layers", "--tokens", "20", "30", "--rounds", "3", "--out", str(tmp_path)]
    bench.main(words, SHAPE)
    rows = {(row["variant"], row["tokens"]): row for row in read_csv(tmp_path / "layers.csv")}
    assert rows.keys() == {(name, tokens) for name in bench.VARIANTS for tokens in ("20", "30")}
    row = rows["fused", "30"]
    assert [row[f"layer_us{end}"] for end in ("", "_lowest", "_highest")] == ["6", "3", "9"]
    assert [float(row[f"times_peft{end}"]) for end in ("", "_lowest", "_highest")] == [3, 3, 3]
    assert (row["times_before"], row["rounds"], row["round_3"]) == ("1.5", "3", "9")
    assert (row["step_gb"], row["note"]) == ("0.5", "")
    typed = "python benchmarks/fused_lora_layers.py --parts layers --tokens 20 30 --rounds 3"
    assert row["command"] == typed
    failed = rows["fused, the copy alone", "20"]
    assert failed["note"] == "RuntimeError: no such kernel"
    assert failed["layer_us"] == failed["times_peft"] == ""
    assert "fused, the copy alone, tokens 20, note RuntimeError" in capsys.readouterr().out


def test_without_time_every_line_says_so(tmp_path):
    bench.main(["--parts", "layers", "--seconds", "-1", "--out", str(tmp_path)], SHAPE)
    rows = read_csv(tmp_path / "layers.csv")
    assert {row["note"] for row in rows} == {"no time was left"}
    assert len(rows) == 2 * len(bench.VARIANTS)


def test_kernels_are_timed_in_a_process_whose_failure_costs_no_layer(tmp_path, monkeypatch, capsys):
    started, plain = [], subprocess.run

    def run(words, **options):
        if words[0] == "git":
            return plain(words, **options)
        started.append(kernels.parse_options([str(word) for word in words[2:]]))
        raise subprocess.CalledProcessError(-11, "kernels")

    monkeypatch.setattr(subprocess, "run", run)
    words = ["--parts", "kernels", "sweep", "layers", "--tokens", "20", "--variants", "peft"]
    bench.main([*words, "--rounds", "1", "--out", str(tmp_path)], SHAPE)
    assert [one.sweep for one in started] == [False, True]
    assert {(*one.tokens, one.out) for one in started} == {(20, tmp_path)}
    assert (
        started[0].command == f"python benchmarks/fused_lora_layers.py {' '.join(words)} --rounds 1"
    )
    assert "kernels: CalledProcessError" in capsys.readouterr().out
    assert [row["times_peft"] for row in read_csv(tmp_path / "layers.csv")] == ["1.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [bench, kernels], ids=["layers", "kernels"])
def test_without_a_gpu_it_ends_with_a_sentence(script, tmp_path):
    sentence = pytest.raises(SystemExit, match=r"^error: this needs a GPU [^\n]*$")
    with sentence as ended, mistakes_in_one_line():
        script.main(["--out", str(tmp_path / "out")])
    assert isinstance(ended.value.code, str), "which Python prints, and exits with 1"
    assert not (tmp_path / "out").exists()


INTERPRETED = """
import sys
sys.path.insert(0, "benchmarks")
import fused_lora_kernels as script
import torch
from sftlab.fastpath import mlp_kernel, mlp_ops
script.timed = lambda call: call() and [1.0, 3.0, 2.0]
mlp_ops.has_kernels = lambda x: True
plain = mlp_kernel.beside
def fails(*of):
    if len(of) == 3:
        raise RuntimeError("no such tile")
    plain(*of)
mlp_kernel.beside = fails
shape = script.Shape(64, 96, 4, 2, rank=8, device="cpu", dtype=torch.float32)
script.main(["--tokens", "70", "--out", sys.argv[1]], shape)
"""


@pytest.mark.long
@with_triton
def test_kernels_are_held_to_float64_under_tritons_interpreter(tmp_path):
    interpret("-c", INTERPRETED, str(tmp_path), timeout=120)
    rows = read_csv(tmp_path / "kernels.csv")
    found = {(row["kernel"], row["form"]): row for row in rows}
    assert found.pop(("beside", "4 512 4"))["note"] == "RuntimeError: no such tile"
    assert len(found) == 5
    for row in found.values():
        assert float(row["error"] or "nan") < 2e-6, row
        assert (row["us"], row["lowest"], row["highest"], row["torch_us"]) == (
            "2.0",
            "1.0",
            "3.0",
            "2.0",
        )
    # 70 tokens of 3 x 96 elements of 4 bytes in 2 us
    assert found["gated", "1 1024 4"]["gb_per_s"] == "40"
