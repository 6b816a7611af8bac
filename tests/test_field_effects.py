"""No field is ignored in silence: each has an effect, or is refused with the reason."""

import dataclasses

import pytest
from conftest import arguments
from trl import DPOConfig, ModelConfig, SFTConfig

from sftlab.config.field_effects import DECIDED, HAS_EFFECT, MEANINGLESS
from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.config.preference_fields import ALONE, REFUSED_OF_PAIRS

CLASSES = (DECIDED, MEANINGLESS, HAS_EFFECT)
THEIRS = {f.name for group in (SFTConfig, ModelConfig) for f in dataclasses.fields(group)}


def test_every_field_of_the_installed_libraries_is_in_exactly_one_class():
    assert {name: n for name in THEIRS if (n := sum(name in c for c in CLASSES)) != 1} == {}
    assert set().union(*CLASSES) - THEIRS == set(), "fields that the libraries no longer have"


@pytest.mark.parametrize("name", sorted(DECIDED | MEANINGLESS))
def test_a_field_without_effect_is_refused_with_the_reason(fields, name):
    with pytest.raises(ValueError, match=f"{name} is not used here: ..."):
        parse_recipe([*arguments(fields), f"--{name}=1"], Launch.from_environment())


def test_every_field_of_preference_tuning_has_an_effect_or_is_refused():
    theirs = {f.name for f in dataclasses.fields(DPOConfig)}
    known = set(ALONE) | set(REFUSED_OF_PAIRS) | HAS_EFFECT | set(DECIDED) | set(MEANINGLESS)
    assert theirs - known == set(), "fields without a class"
    assert set(ALONE) - theirs == set(), "fields that trl no longer has"


@pytest.mark.parametrize("name", sorted(REFUSED_OF_PAIRS))
def test_a_field_without_effect_on_pairs_is_refused_with_the_reason(fields, name):
    with pytest.raises(ValueError, match=f"{name} is not used here: ..."):
        parse_recipe([*arguments(fields), "--method=dpo", f"--{name}=1"], Launch.from_environment())


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("sft", "beta", "beta is a field of preference tuning: add method: dpo"),
        ("dpo", "packing_strategy", "packing_strategy is not used here"),
    ],
)
def test_a_field_of_the_other_method_is_named_as_such(fields, method, name, message):
    words = [*arguments(fields), f"--method={method}", f"--{name}=1"]
    with pytest.raises(ValueError, match=message):
        parse_recipe(words, Launch.from_environment())
