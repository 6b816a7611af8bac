"""Several processes of an evaluation: whole batches are dealt, and the results are those of one."""

import subprocess

import fork_server
import pytest
from conftest import ROOT, load_script

from sftlab.evaluation.answer_file import AnswerFile, fill
from sftlab.evaluation.generation import Answer
from sftlab.evaluation.processes import Processes


class Apart(Processes):
    """Processes that are tried one after the other, and wait for none."""

    def wait(self):
        pass


def test_whole_batches_are_dealt_and_every_answer_is_kept(tmp_path):
    asked = []

    def answers(prompts, seed):
        asked.append((list(prompts), seed))
        return [Answer(prompt, 1, "stop", False) for prompt in prompts]

    rows, prompts = list(range(7)), list("abcdefg")
    for rank in (0, 1):
        file = AnswerFile(tmp_path, {}, processes=Apart(rank, 2))
        fill(file, "base", rows, prompts, 2, answers, "")
        assert len(file.found) == (4, 7)[rank], "what the others have added is there"
    assert asked == [(["a", "b"], 0), (["e", "f"], 4), (["c", "d"], 2), (["g"], 6)]
    found = AnswerFile(tmp_path, {}).found
    assert {row: one.text for (_, row), one in found.items()} == dict(enumerate("abcdefg"))


def test_parts_of_batches_come_back_in_their_order():
    assert Processes().merged({1: "b", 0: "a", 2: "c"}) == ["a", "b", "c"]


@pytest.mark.long
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_two_processes_give_the_results_of_one_to_the_last_bit(finished, tmp_path, temperature):
    asked = ["--samples", "9", "--batch_size", "2", "--max_new_tokens", "6"]
    asked += ["--temperature", temperature]
    found = []
    for launcher in ([], ["--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml")]):
        run = tmp_path / str(len(launcher))
        run.mkdir()
        for name in ("adapter", "run.json"):
            (run / name).symlink_to(finished[0] / name)
        words = [*launcher, "--run", str(run), *asked]
        command = [fork_server.python(), str(ROOT / "eval" / "quality.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("base against tuned on 9 held-out rows") == 1
        found.append((run / "eval" / "quality.jsonl").read_bytes())
    assert found[0] == found[1]


def test_what_one_process_alone_can_do_is_refused_for_several(finished, monkeypatch):
    quality = load_script("eval/quality.py")
    monkeypatch.setattr(quality.Processes, "joined", lambda: Processes(0, 2))
    with pytest.raises(SystemExit, match="a server is asked by one process"):
        quality.main(["--run", str(finished[0]), "--server", "http://127.0.0.1:1/v1"])
