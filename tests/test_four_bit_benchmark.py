"""The benchmark of 4-bit weights times what computes the same, and says what failed."""

import pytest
import torch
from conftest import load_script
from triton_interpreter import interpret, with_triton

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.tables import read_csv

bench = load_script("benchmarks/four_bit_weights.py")
SIZES = (bench.Sizes("q_proj", 64, 128, "cpu", torch.float16),)


def test_without_time_every_line_says_so(tmp_path):
    bench.main(["--seconds", "-1", "--out", str(tmp_path)], SIZES)
    (row,) = read_csv(tmp_path / "weights.csv")
    assert (row["what"], row["linears"], row["note"]) == ("weights", "q_proj", bench.NO_TIME)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_sentence(tmp_path):
    sentence = pytest.raises(SystemExit, match=r"^error: this needs a GPU [^\n]*$")
    with sentence, mistakes_in_one_line():
        bench.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_fails_costs_its_own_line_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "timed", lambda call: call() is None or [1.0, 3.0, 2.0])
    bench.main(["--tokens", "20", "--out", str(tmp_path)], SIZES)
    weights, float8, transposed, products, _ = read_csv(tmp_path / "weights.csv")
    assert [float8["equal"], transposed["equal"]] == ["True", "True"]
    assert (weights["equal"], weights["us"], weights["bitsandbytes_us"]) == ("True", "2.0", "2.0")
    assert (weights["lowest"], weights["highest"], weights["note"]) == ("1.0", "3.0", "")
    assert products["note"] == "ValueError: the weights are on the cpu"
    assert "products of q_proj [64, 128]: ValueError" in capsys.readouterr().out


INTERPRETED = """
import sys
sys.path.insert(0, "benchmarks")
import four_bit_weights as script
import torch
from sftlab.fastpath import four_bit_float8_weight, four_bit_linear, four_bit_weight
for module in (four_bit_linear, four_bit_weight, four_bit_float8_weight):
    module.has_kernels = lambda x: True
script.timed = lambda call: call() is None or [1.0, 3.0, 2.0]
script.FORMS = ((64, 1), (128, 2))
script.TILES = ((16, 4, 1), (32, 2, 2))
sizes = (script.Sizes("q_proj", 64, 128, "cpu", torch.float16),)
for words in ([], ["--sweep"]):
    script.main([*words, "--tokens", "70", "--out", sys.argv[1]], sizes)
"""


@pytest.mark.long
@with_triton
def test_weights_and_products_are_bitsandbytes_own_under_tritons_interpreter(tmp_path):
    interpret("-c", INTERPRETED, str(tmp_path))
    rows = read_csv(tmp_path / "weights.csv")
    whats = bench.WEIGHTS, bench.FLOAT8, bench.TRANSPOSED, bench.PRODUCTS, bench.FLOAT8_PRODUCTS
    assert [(row["what"], row["note"]) for row in rows] == [(what, "") for what in whats]
    # Triton's interpreter cuts float8 off
    assert [row["equal"] for row in rows] == ["True", "False", "False", "True", ""]
    moved = 64 * 128 * 2.5 + 128 + 4  # 16 and 4 bits a weight, a byte a block, one larger scale
    assert float(rows[0]["gb_per_s"]) == round(moved / 2.0 / 1e3)
    moved -= 64 * 128
    assert float(rows[2]["gb_per_s"]) == round(moved / 2.0 / 1e3)
    assert rows[3]["tokens"] == "70" and float(rows[3]["host_us"]) > 0
    assert 0.01 < float(rows[4]["apart"]) < 0.1
    forms = read_csv(tmp_path / "sweep.csv")
    assert [row["form"] for row in forms] == ["64 1", "128 2", "64 1", "128 2", "16 4 1", "32 2 2"]
    assert [row["equal"] for row in forms[:2]] == ["True", "True"]
    assert {row["note"] for row in forms} == {""}
