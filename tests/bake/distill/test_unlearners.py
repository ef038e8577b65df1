"""The table of methods."""

from __future__ import annotations

import pytest

from bake.distill.unlearners import UNLEARNERS, unlearner_of
from bake.errors import RecipeError
from export.carriers.carriers import CARRIERS


def test_every_method_is_a_carrier_and_none_besides() -> None:
    assert {name for name, carrier in CARRIERS.items() if carrier.trained} == set(UNLEARNERS)
    for name in UNLEARNERS:
        carrier = CARRIERS[name]
        assert carrier.engine == name and not carrier.exact and not carrier.strips
        assert carrier.baseline == (name != "merged")


def test_an_unknown_method() -> None:
    with pytest.raises(RecipeError, match=r'--method "rum": expected one of merged, rmu, '):
        unlearner_of("rum")


def test_what_trains_has_steps_and_a_rate() -> None:
    for name, method in UNLEARNERS.items():
        trained = method.loss is not None
        assert (method.steps > 0) == (method.learning_rate > 0) == trained, name
        assert method.strength > 0 and method.strength_is
