"""recipes/show.py prints rows as the model gets them, and warns of what is wrong with them."""

import pytest
from conftest import arguments, load_script, write_jsonl
from preference_runs import pair_fields
from tokenizing import fields_of, tokenized

from sftlab.data.row_checks import check_lines, check_rows
from sftlab.data.row_pictures import histogram


@pytest.fixture(scope="module")
def show():
    return load_script("recipes/show.py")


def printed(show, capsys, fields, *more):
    capsys.readouterr()
    show.main([*arguments(fields), *more])
    return capsys.readouterr().out


def test_rows_are_printed_with_their_loss_marked(show, fields, capsys):
    said = printed(show, capsys, fields, "--rows", "1")
    row = "<bos>### Instruction:\nRepeat the number 0 in words.\n\n### Response:\n[[It is 0<eos>]]"
    assert "row 0: 71 tokens, 8 in the loss, ends with '<eos>'" in said
    assert row in said
    assert "{question}" in said
    assert "training row 1" not in said


def test_a_line_end_behind_the_end_token_is_no_missing_end(show, fields, capsys, tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 10)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template)
    own = fields | {
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "split_fractions": ["1", "0", "0"],
        "chat_template_path": str(tmp_path / "t.jinja"),
    }
    said = printed(show, capsys, own, "--rows", "1")
    assert r"6 in the loss, ends with '<eos>\n'" in said
    cut = printed(show, capsys, own | {"max_length": "44"}, "--rows", "1")
    assert "4 in the loss, NO END TOKEN in the loss" in cut and "[[a<eos>" in cut


def test_rows_that_are_cut_say_so_and_are_warned_of(show, fields, capsys):
    said = printed(show, capsys, fields | {"max_length": "66"}, "--rows", "1")
    assert "row 0: 66 tokens, cut from 71, 3 in the loss, NO END TOKEN in the loss" in said
    assert "[[It ]]" in said
    assert "lose their end token to max_length 66" in said


def test_every_token_has_a_line_where_it_is_asked_for(show, fields, capsys):
    said = printed(show, capsys, fields, "--rows", "1", "--tokens").splitlines()
    assert ["70", "257", "'<eos>'", "yes"] in [line.split() for line in said]
    assert ["0", "256", "'<bos>'"] in [line.split() for line in said]


def test_a_terminal_gets_colour_unless_it_wants_none(show, fields, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;32mIt is 0<eos>\x1b[0m" in printed(show, capsys, fields)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[It is 0<eos>]]" in printed(show, capsys, fields)


def test_tokens_and_streams_are_shown_as_the_text_is(show, fields, base, rows, capsys, tmp_path):
    def shown(fields):
        return printed(show, capsys, fields, "--rows", "2").split("\nrows")[0]

    text = shown(fields)
    assert shown(fields | {"dataset_streaming": "true"}) == text
    of_tokens = fields_of(base, rows, tmp_path, max_length="128")
    tokenized(load_script("slurm/tokenize_dataset.py"), of_tokens, tmp_path / "tokens")
    assert shown(fields | {"dataset_name": str(tmp_path / "tokens")}) == text


def test_faults_of_rows_are_counted_with_the_first_one():
    masked, begin, end = -100, 1, 2
    rows = [
        ([1, 5, 6, 2], [masked, masked, 6, 2]),
        ([1, 5, 7, 8], [masked, masked, 7, 8]),  # the same prompt, cut at 4 tokens
        ([1, 9, 7], [masked, masked, 7]),  # no end
        ([1, 1, 9, 2], [masked, masked, masked, 2]),
        ([1, 4], [masked, masked]),
    ]
    checks = check_rows(rows, {end}, begin, limit=4)
    assert checks == (5, (1, 1), (1, 2), (1, 3), (1, 4), (1, 1))
    lines = check_lines(checks, 4)
    assert [line.startswith("warning: ") for line in lines] == [True] * 4 + [False]
    assert check_lines(check_rows(rows[:1], {end}, begin, 4), 4) == []


def test_a_histogram_counts_every_row():
    lines = histogram([5, 6, 11, 100], 50).splitlines()
    assert [int(line.split()[-1]) for line in lines if "max_length" not in line] == (
        [2, 1, *[0] * 6, 1]
    )
    assert histogram([1], None).split() == ["1-1", "#" * 40, "1"]


def test_a_run_says_before_its_first_step_what_is_wrong_with_its_rows(fields, tmp_path, train_here):
    same = [{"question": "Why?", "answer": "a" * 90 + str(i)} for i in range(40)]
    path = write_jsonl(tmp_path / "same.jsonl", same)
    own = {"dataset_name": str(path), "split_fractions": ["1", "0", "0"], "max_steps": "1"}
    done = train_here(fields | own)
    assert done.returncode == 0, done.stderr
    assert "39 of the first 40 training rows have the prompt of an earlier row" in done.stdout
    assert "40 of the first 40 training rows lose their end token" in done.stdout


@pytest.mark.parametrize("words", [("--rows", "-1"), ("--look", "0"), ("--look", "1" + "0" * 30)])
def test_numbers_of_rows_that_mean_nothing_are_refused(show, words):
    with pytest.raises(ValueError, match="--rows must be from 0 to 1,000,000,000"):
        show.main(list(words))


def test_both_sides_of_a_pair_are_printed(show, base, tmp_path, capsys):
    rows = [
        {"prompt": f"Is {n} even?", "chosen": f"Yes, {n}.", "rejected": "No, it is odd."}
        for n in range(20)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    own = pair_fields(base, path, tmp_path / "run") | {"split_fractions": ["1", "0", "0"]}
    said = printed(show, capsys, own, "--rows", "1")
    prompt = len("### Instruction:\nIs 0 even?\n\n### Response:\n") + 1
    for side, answer in (("chosen", 8), ("rejected", 15)):
        size = f"{prompt + answer} tokens, {answer} in the loss, ends with '<eos>'"
        assert f"training pair 0, {side}: {size}" in said
    assert "[[Yes, 0.<eos>]]" in said and "[[No, it is odd.<eos>]]" in said
    assert "have the prompt of an earlier row" not in said
    assert "tokens of the first 40 sides of training pairs" in said
    assert "recipes/dpo.py and the same options" in said
    cut = printed(show, capsys, own | {"max_length": str(prompt + 10)}, "--rows", "0")
    assert "20 of the first 20 rejected sides lose their end token to max_length" in cut
    assert "chosen sides lose" not in cut


def test_a_pair_that_the_cut_leaves_out_is_said_so(show, base, tmp_path, capsys):
    rows = [{"prompt": "Why?", "chosen": f"Because {n}.", "rejected": "Because."} for n in range(9)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    own = pair_fields(base, path, tmp_path / "run") | {"split_fractions": ["1", "0", "0"]}
    whole = printed(show, capsys, own, "--rows", "1")
    size = int(whole.split("pair 0, chosen: ")[1].split(" tokens")[0])
    same = printed(show, capsys, own | {"max_length": str(size - 4)}, "--rows", "1")
    assert "this pair is left out: max_length" in same and "makes its sides equal" in same
    assert "9 of the first 9 training pairs are left out" in same
