"""No field is ignored in silence: each has an effect, or is refused with the reason."""

import dataclasses

import pytest
from conftest import arguments
from trl import ModelConfig, SFTConfig

from sftlab.config.field_effects import DECIDED, HAS_EFFECT, MEANINGLESS
from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe

CLASSES = (DECIDED, MEANINGLESS, HAS_EFFECT)
THEIRS = {f.name for group in (SFTConfig, ModelConfig) for f in dataclasses.fields(group)}


def test_every_field_of_the_installed_libraries_is_in_exactly_one_class():
    assert {name: n for name in THEIRS if (n := sum(name in c for c in CLASSES)) != 1} == {}
    assert set().union(*CLASSES) - THEIRS == set(), "fields that the libraries no longer have"


@pytest.mark.parametrize("name", sorted(DECIDED | MEANINGLESS))
def test_a_field_without_effect_is_refused_with_the_reason(fields, name):
    with pytest.raises(ValueError, match=f"{name} is not used here: ..."):
        parse_recipe([*arguments(fields), f"--{name}=1"], Launch.from_environment())
