"""A file of settings is read once, quickly, and each mistake in it is one sentence."""

import time

import pytest
from conftest import ROOT

from sftlab.yaml_files import MOST_BYTES, read_yaml

BOMB = "\n".join(
    ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 12)]
)
WRONG = {
    "twice": ("lora_r: 8\nseed: 1\nlora_r: 16\n", "line 3: lora_r stands there twice"),
    "twice within": ("cells:\n  a: {lora_r: 1, lora_r: 2}\n", "line 2: lora_r stands there twice"),
    "a number": ("8: {lora_r: 8}\n", "line 1: the key 8 is no text: put it in quotes"),
    "a truth": ("cells: {no: {lora_r: 8}}\n", "the key no is no text"),
    "a list": ("? [a, b]\n: 3\n", "the key sequence is no text"),
    "null": ("~: 3\n", "is no text"),
    "bomb": (BOMB, "more than 10,000 values with the aliases written out"),
    "in itself": ("a: &x [*x]\n", "a value holds itself"),
    "deep": (f"a: {5000 * '['}{5000 * ']'}\n", "more than 50 levels"),
    "no date": ("a: 2024-13-45\n", "a value that YAML cannot read"),
    "large": (f"a: {MOST_BYTES * 'x'}\n", "has 262,148 bytes"),
    "code": ("a: !!python/name:os.system\n", "could not determine a constructor"),
    "control": ("a: \x07\n", "is not YAML"),
    "list": ("- a\n", "must hold 'field: value' lines, got list"),
    "empty": ("", "must hold 'field: value' lines, got NoneType"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_at_once_with_the_file(text, said, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    assert time.process_time() - began < 2
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "wrong.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_yaml(tmp_path / "wrong.yaml")


def test_anchors_and_merges_of_a_usual_size_are_read(tmp_path):
    path = tmp_path / "right.yaml"
    path.write_text("base: &b {lora_r: 8, seed: 1}\nmore: {<<: *b, lora_r: 16}\nagain: *b\n")
    found = read_yaml(path)
    assert found["more"] == {"lora_r": 16, "seed": 1} and found["again"] == found["base"]


def test_every_file_of_settings_in_the_repository_is_read():
    paths = [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("accelerate_configs/*.yaml")]
    assert len(paths) > 30
    for path in paths:
        assert read_yaml(path)
