"""Several processes of an evaluation: whole batches are dealt, and the results are those of one."""

import itertools
import subprocess

import fork_server
import pytest
import torch.distributed as dist
from conftest import ROOT, load_script

from sftlab.evaluation import processes
from sftlab.evaluation.answer_file import AnswerFile, fill
from sftlab.evaluation.generation import Answer
from sftlab.evaluation.processes import Processes


class Apart(Processes):
    """Processes that are tried one after the other, wait for none, and take turns at batches."""

    def wait(self):
        pass

    def dealt(self, batches):
        return range(self.rank, batches, self.count)


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


def test_a_process_that_is_free_takes_the_next_batch(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    for _ in range(2):  # a second deal begins anew
        deal = next(processes._DEALS)
        monkeypatch.setattr(processes, "_DEALS", itertools.repeat(deal))
        slow, fast = (iter(Processes(rank, 2).dealt(5)) for rank in (0, 1))
        monkeypatch.setattr(processes, "_DEALS", itertools.count(deal + 1))
        assert (next(slow), list(fast), list(slow)) == (0, [1, 2, 3, 4], [])


def test_answers_of_one_model_are_not_waited_for(tmp_path):
    waits = []

    class Counting(Apart):
        def wait(self):
            waits.append(self.rank)

    file = AnswerFile(tmp_path, {}, processes=Counting(0, 2))
    opened = len(waits)
    asked = [0], ["a"], 1, lambda prompts, seed: [Answer("a", 1, "stop", False)]
    fill(file, "base", *asked, "", together=False)
    assert len(waits) == opened
    fill(file, "tuned", *asked, "")
    assert len(waits) > opened


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
