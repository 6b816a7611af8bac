"""Judged evaluations over several processes: answers, draws and judgements are those of one."""

import json
import subprocess

import fork_server
import pytest
from conftest import ROOT, byte_tokenizer, load_script, write_base
from judging import answer, lines

from sftlab.data.chat_template import set_template
from sftlab.evaluation.processes import Processes

SHORT = ["--max_new_tokens", "6", "--batch_size", "2", "--sanity_checks", "3"]
JUDGED = ["--judge_max_new_tokens", "4", "--judge_batch_size", "2", "--judge_format", "fastchat"]


@pytest.fixture
def judge(tmp_path):
    """A random causal model with a chat template, and room for a judge's prompt."""
    folder = tmp_path / "judge"
    write_base(folder)
    config = json.loads((folder / "config.json").read_text())
    longer = config | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(longer))
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return ["--judge", str(folder), *JUDGED]


@pytest.fixture
def instructions(tmp_path):
    rows = [{"instruction": f"Say {i}.", "output": str(i), "generator": "x"} for i in range(7)]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    return ["--reference", "base", "--instructions", str(tmp_path / "asked.json")]


@pytest.fixture
def questions(tmp_path):
    """Questions of categories that are greedy, and of such that are sampled."""
    kinds = ("math", "writing", "roleplay")
    rows = [
        {"question_id": i, "category": kinds[i % 3], "turns": [f"Say {i}.", f"Now {i + 1}."]}
        for i in range(12)
    ]
    right = [{"question_id": i, "choices": [{"turns": ["a", "b"]}]} for i in range(0, 12, 3)]
    for name, content in (("asked", rows), ("right", right)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return [
        *("--questions", str(tmp_path / "asked.jsonl")),
        *("--references", str(tmp_path / "right.jsonl")),
    ]


@pytest.fixture
def evaluated(untrained, tmp_path, judge):
    """Evaluates in so many processes; returns the judged records and the kept answers."""

    def evaluate(script, flags, processes):
        run = tmp_path / f"run{processes}"
        run.mkdir()
        for name in ("adapter", "run.json"):
            (run / name).symlink_to(untrained / name)
        launch = ROOT / "accelerate_configs" / ("cpu_ddp.yaml" if processes > 1 else "cpu.yaml")
        command = [
            *(fork_server.python(), str(ROOT / "eval" / f"{script}.py")),
            *("--config_file", str(launch), "--run", str(run), *judge, *flags, *SHORT),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        # a random judge gives no verdict, so there is no score
        assert "hold no" in done.stderr, done.stderr[-3000:]
        assert done.stdout.count("base against tuned of") == 1
        kept = {}
        for path in sorted((run / "eval").glob("*-????????????.jsonl")):
            _settings, *batches = path.read_text().splitlines()
            each = [json.loads(line) for line in batches]
            kept[path.name] = {
                (one["side"], row): answer
                for one in each
                for row, answer in zip(one["rows"], one["answers"], strict=True)
            }
            assert len(kept[path.name]) == sum(len(one["rows"]) for one in each), "asked twice"
        return lines(run, f"{script}-judgements-*.jsonl"), kept

    return evaluate


@pytest.mark.long
def test_alpaca_over_two_processes_is_that_of_one(evaluated, instructions):
    one, two = (evaluated("alpaca", instructions, processes) for processes in (1, 2))
    assert one == two
    assert len(one[0]) == 7 and len(one[1]) == 4, "answers, two draws, and judgements"


@pytest.mark.long
def test_mt_bench_over_two_processes_is_that_of_one(evaluated, questions):
    one, two = (evaluated("mt_bench", questions, processes) for processes in (1, 2))
    assert one == two
    assert len(one[0]) == 2 * 2 * 12


def test_one_process_asks_alpaca_evals_annotators(untrained, instructions, monkeypatch):
    alpaca = load_script("eval/alpaca.py")
    monkeypatch.setattr(alpaca.Processes, "joined", lambda: Processes(1, 2))
    monkeypatch.setattr(alpaca, "Annotators", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(alpaca, "contestants_of", lambda *_: Drawing())
    alpaca.main(["--run", str(untrained), *instructions, "--annotators", "any"])


class Drawing:
    """Two models whose answers are there already."""

    prompts_cut, sides = 0, ("base", "tuned")

    def answers(self, side, asked, sampling, title):
        return [answer(side) for _ in asked]

    def draws(self, asked, sampling, title):
        return [self.answers("base", asked, sampling, title)] * 2

    def free(self):
        pass
