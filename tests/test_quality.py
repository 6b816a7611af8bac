"""eval/quality.py scores base and tuned on held-out rows, and continues after a kill."""

import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from fnmatch import fnmatch

import fork_server
import numpy as np
import pytest
import torch
from conftest import ROOT, answered, copy_of, load_script, read, records, write_jsonl
from judged_runs import SHORT, change_adapter, report
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from sftlab.comparison.result_files import read_records
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import load_pair
from sftlab.evaluation.generation import Answer, Generator
from sftlab.runs.made_files import EVALUATIONS

SCORES = [
    "response_perplexity",
    "text_perplexity",
    "exact_match",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
]


@pytest.fixture(scope="module")
def quality():
    return load_script("eval/quality.py")


@pytest.fixture
def run(finished, tmp_path):
    return copy_of(finished[0], tmp_path / "run")


def command(run, *flags, python=sys.executable):
    return [python, str(ROOT / "eval" / "quality.py"), "--run", str(run), *flags]


def test_the_table_the_file_and_the_records_agree(run):
    done = subprocess.run(
        command(run, *SHORT), capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, rows = report(run), records(run)
    assert found["rows"] == len(rows) == read(run)["data"]["test"]["rows"]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert list(found["scores"]) == SCORES
    references = [row["reference"] for row in rows]
    for side in ("base", "tuned"):
        texts = [row[side]["text"] for row in rows]
        values = {name: one[side]["value"] for name, one in found["scores"].items()}
        for name, kind in (
            ("response_perplexity", "response_nll"),
            ("text_perplexity", "text_nll"),
        ):
            nats, tokens = np.array([row[side][kind] for row in rows]).sum(axis=0)
            assert values[name] == pytest.approx(np.exp(nats / tokens), rel=1e-9)
        assert values["bleu"] == pytest.approx(
            BLEU().corpus_score(texts, [references]).score, abs=1e-9
        )
        scorer = RougeScorer(["rougeL"])
        rouge = [
            scorer.score(r, t)["rougeL"].fmeasure for r, t in zip(references, texts, strict=True)
        ]
        assert values["rougeL"] == pytest.approx(np.mean(rouge), abs=1e-9)
        for one in found["scores"].values():
            low, high = one[side]["interval_95"]
            assert low <= one[side]["value"] <= high
    one = found["scores"]["response_perplexity"]
    assert one["tuned"]["value"] < one["base"]["value"]
    assert one["p_holm"] >= one["p_value"]
    assert found["generation"]["max_new_tokens"] == 16
    assert found["generation"]["temperature"] == 0
    assert "version:" in found["bleu"]
    assert len(re.findall(r"^  row \d", done.stdout, re.M)) == 3
    assert "95 % intervals" in done.stdout
    assert "Holm over 7 scores" in done.stdout


def test_a_result_of_fewer_rows_leaves_a_larger_one(quality, tmp_path, capsys):
    given, evaluated = Namespace(run=tmp_path, dataset_name=None), tmp_path / "eval"
    for rows, said in ((5, ""), (5, ""), (7, ""), (2, "eval/of-7-rows-quality.json"), (3, "")):
        quality.write(given, {"rows": rows}, [{"row": n} for n in range(rows)])
        printed = capsys.readouterr().out
        assert said in printed and bool(said) == bool(printed)
        lines = (evaluated / "quality.jsonl").read_text().splitlines()
        assert len(lines) == json.loads((evaluated / "quality.json").read_text())["rows"] == rows
    kept = sorted(path.name for path in evaluated.glob("of-*"))
    assert kept == ["of-7-rows-quality.json", "of-7-rows-quality.jsonl"]
    assert json.loads((evaluated / kept[0]).read_text()) == {"rows": 7}
    assert any(fnmatch(f"eval/{kept[1]}", pattern) for pattern in EVALUATIONS)


def test_the_batch_size_changes_nothing(quality, finished, tmp_path):
    found = {}
    for size in (1, 4, 16):
        run = copy_of(finished[0], tmp_path / str(size))
        quality.main(["--run", str(run), "--batch_size", str(size), *SHORT])
        found[size] = (
            report(run)["scores"],
            [[r[s]["text"] for s in ("base", "tuned")] for r in records(run)],
        )
    for size in (4, 16):
        assert found[size][1] == found[1][1]
        for name in SCORES:
            for side in ("base", "tuned"):
                assert found[size][0][name][side]["value"] == pytest.approx(
                    found[1][0][name][side]["value"], rel=1e-6
                )


def test_base_against_base_is_no_difference(quality, run):
    change_adapter(run, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)
    quality.main(["--run", str(run), *SHORT])
    for name, one in report(run)["scores"].items():
        low, high = one["difference"]["interval_95"]
        assert one["difference"]["value"] == 0
        assert low == -high  # other rows may differ, on a scale with ends
        assert high == 0 or "perplexity" not in name
        assert one["p_value"] == one["p_holm"] == 1.0


def test_answers_are_scored_as_they_are_and_empty_ones_counted(quality, run, monkeypatch):
    model = load_pair(run, read(run))
    tokenizer = quality.run_tokenizer(run, read(run))
    asked = {}
    for row in answered(quality.held_out(read(run)).rows):
        asked[tuple(prompt_ids(tokenizer, row["prompt"]))] = row["completion"][0]["content"]

    def canned(self, prompts, seed=0):
        tuned = (
            self.model.get_base_model().model.layers[0].self_attn.q_proj.disable_adapters is False
        )
        texts = [asked[tuple(prompt)] if tuned else "" for prompt in prompts]
        return [Answer(text, 3, "stop", False) for text in texts]

    monkeypatch.setattr(quality, "load_pair", lambda *_: model)
    monkeypatch.setattr(Generator, "answers", canned)
    quality.main(["--run", str(run)])
    found = report(run)
    assert found["answers"]["base"]["empty"] == found["rows"]
    assert found["answers"]["tuned"]["empty"] == 0
    assert found["scores"]["bleu"]["base"]["value"] == 0
    assert found["scores"]["bleu"]["tuned"]["value"] == pytest.approx(100)
    assert found["scores"]["rouge1"]["tuned"]["value"] == 1
    low, high = found["scores"]["rouge1"]["tuned"]["interval_95"]
    assert (low, high) == (
        pytest.approx(1 - 3.84 / (found["rows"] + 3.84), abs=1e-3),
        pytest.approx(1),
    )  # Wilson
    assert found["scores"]["rougeL"]["base"]["value"] == 0


SLOW = ("--max_new_tokens", "100", "--batch_size", "2")


@pytest.fixture(scope="module")
def undisturbed(quality, finished, tmp_path_factory):
    """A run with its evaluation."""
    whole = copy_of(finished[0], tmp_path_factory.mktemp("undisturbed") / "run")
    quality.main(["--run", str(whole), *SLOW])
    return whole


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.long
def test_an_evaluation_that_is_ended_goes_on_where_it_stopped(
    quality, finished, undisturbed, tmp_path, number
):
    flags, whole, killed = SLOW, undisturbed, copy_of(finished[0], tmp_path / "killed")
    process = subprocess.Popen(
        command(killed, *flags, python=fork_server.python()),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 120
    while time.time() < deadline:
        files = list((killed / "eval").glob("answers-*.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    size = files[0].stat().st_size
    time.sleep(0.3)
    assert files[0].stat().st_size == size
    process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    said = process.communicate()[1].decode()
    assert process.returncode in (-number, 128 + number)
    if number == signal.SIGTERM:
        assert said.endswith(
            "stopped: the same command goes on, since answers are kept as they come\n"
        )
    kept = files[0].read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert not (killed / "eval" / "quality.json").exists()
    quality.main(["--run", str(killed), *flags])
    assert files[0].read_bytes().startswith(kept)
    assert records(killed) == records(whole)
    assert files[0].read_bytes().count(b"\n") == (
        whole / "eval" / files[0].name
    ).read_bytes().count(b"\n")


def test_lines_are_ended_by_line_feeds_alone(tmp_path):
    """Text from the web has other line separators in it."""
    figures = {"response_nll": [1.0], "text_nll": [1.0], "bleu_counts": [1]}
    record = {"row": 0, "reference": "one\u2028two\u0085three"}
    record["tuned"] = {"text": "four\x0bfive", **figures}
    lines = tmp_path / "quality.jsonl"
    lines.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_records(lines) == [record]


def test_a_run_with_the_attention_of_packed_rows_is_evaluated_without_it(finished, tmp_path):
    run = copy_of(finished[0], tmp_path / "run")
    record = read(run)
    record["recipe"]["attn_implementation"] = "varlen"
    assert load_pair(run, record).config._attn_implementation == "sdpa"


def test_scoring_again_generates_nothing(quality, run, monkeypatch):
    quality.main(["--run", str(run), *SHORT])
    first = report(run)
    monkeypatch.setattr(Generator, "answers", lambda *_, **__: pytest.fail("generated again"))
    quality.main(["--run", str(run), *SHORT, "--bleu_tokenize", "char"])
    assert report(run)["scores"]["rougeL"] == first["scores"]["rougeL"]
    assert report(run)["answers"] == first["answers"]
    assert "tok:char" in report(run)["bleu"]


def test_few_rows_are_said_and_intervals_still_given(quality, run, capsys):
    quality.main(["--run", str(run), "--samples", "5", *SHORT])
    found = report(run)
    assert found["rows"] == 5
    assert "fewer than 30 rows" in " ".join(found["warnings"])
    assert "fewer than 30 rows" in capsys.readouterr().out
    assert all(one["difference"]["interval_95"] for one in found["scores"].values())


def test_out_of_memory_keeps_the_answers_and_says_what_to_do(quality, run, monkeypatch):
    answers = Generator.answers

    def runs_out(self, prompts, seed=0):
        if seed >= 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(self, prompts, seed)

    monkeypatch.setattr(Generator, "answers", runs_out)
    with pytest.raises(SystemExit, match="out of memory at --batch_size 4"):
        quality.main(["--run", str(run), "--batch_size", "4", *SHORT])
    assert next((run / "eval").glob("answers-*.jsonl")).read_text().count('"side"') == 2
    monkeypatch.setattr(Generator, "answers", answers)
    quality.main(["--run", str(run), "--batch_size", "2", *SHORT])
    assert len(list((run / "eval").glob("answers-*.jsonl"))) == 1


def test_intervals_of_conversations_are_over_conversations(quality, run, tmp_path):
    def turns(number):
        asked = [f"What comes after {number}?", "And then?", "And then?"]
        answers = [f"It is {number + i}." for i in (1, 2, 3)]
        pairs = zip(asked, answers, strict=True)
        return [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]

    path = write_jsonl(tmp_path / "talk.jsonl", [{"messages": turns(10 * i)} for i in range(4)])
    quality.main(["--run", str(run), "--dataset_name", str(path), "--max_new_tokens", "4"])
    found = json.loads((run / "eval" / "quality-talk.json").read_text())
    # the last turns are beyond max_length
    assert (found["rows"], found["conversations"]) == (8, 4)
    assert "over conversations" in found["statistics"]
    assert "fewer than 30 conversations: the intervals are wide" in found["warnings"]
    lines = (run / "eval" / "quality-talk.jsonl").read_text().splitlines()
    conversations = [json.loads(line)["conversation"] for line in lines]
    assert conversations == sorted([0, 1, 2, 3] * 2)
