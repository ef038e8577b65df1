"""A config's fields by their types, and the families' own configs, which all are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bake.reading.model_config import without_paths, wrong_clamp, wrong_field
from tests.worlds import KINDS, tiny_config


@pytest.mark.parametrize("family", KINDS)
def test_a_config_as_transformers_writes_it_is_right(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert wrong_field(config) is None
    assert without_paths(config) == config


GEMMA_4 = {"model_type": "gemma4_text"}


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ({"hidden_size": True}, "hidden_size is True; expected a whole number above 0"),
        ({"hidden_size": 2304.0}, "hidden_size is 2304.0"),
        ({"num_hidden_layers": 10**9}, "expected a whole number from 1 to 1024"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"layer_types": "full_attention"}, "expected a list of full_attention and"),
        ({"eos_token_id": [1, "2"]}, "expected a token's number or a list of them"),
        ({"rms_norm_eps": -1e-6}, "expected a number above 0"),
        ({"text_config": {"vocab_size": "99"}}, r"text_config\.vocab_size is '99'"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "expected a multiple of"),
        ({"use_bidirectional_attention": "some"}, "expected true, false, all or vision"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "expected none but in Gemma 4"),
        (GEMMA_4 | {"per_layer_config": {"0": {"skip": ["mlp"]}}}, "expected by layer, its own"),
        (GEMMA_4 | {"per_layer_config": {"x": {"head_dim": 8}}}, "expected by layer, its own"),
        (GEMMA_4 | {"per_layer_config": {"0": {"head_dim": 0}}}, "expected by layer, its own"),
        ({"num_hidden_layers": 4, "num_kv_shared_layers": 4}, "expected fewer than 4 layers"),
        ({"num_experts": -1}, "num_experts is -1; expected a whole number above 0"),
        ({"text_config": {"hidden_size_per_layer_input": "6"}}, "expected a whole number"),
    ],
)
def test_a_field_of_another_type_is_named(field: dict[str, Any], match: str) -> None:
    found = wrong_field(field)
    assert found is not None
    with pytest.raises(ValueError, match=match):
        raise ValueError(found)


SITE = {"layer": 1, "k": 3, "exempt_bos": True}


@pytest.mark.parametrize(
    ("site", "ids", "wrong"),
    [
        (SITE, [2], None),
        (SITE, [], None),
        ({**SITE, "exempt_bos": "no"}, [2], "exempt_bos is 'no'"),
        ({**SITE, "exempt_bos": 1}, [2], "exempt_bos is 1"),
        ({**SITE, "layer": True}, [2], "layer is True"),
        ({**SITE, "layer": -1}, [2], "layer is -1"),
        ({**SITE, "layer": 4}, [2], "layer is 4"),
        ({**SITE, "k": 0}, [2], "k is 0"),
        (SITE, [99], "exempt_token_ids is [99]"),
        (SITE, [-1], "exempt_token_ids is [-1]"),
        (SITE, "2", "exempt_token_ids is '2'"),
    ],
)
def test_a_clamp_of_other_types_is_named(site: Any, ids: Any, wrong: str | None) -> None:
    section = {"schema": 1, "sites": [site], "exempt_token_ids": ids}
    found = wrong_clamp(section, n_layers=4, vocab_size=99)
    assert found == wrong if wrong is None else wrong in str(found)
    twice = {**section, "sites": [SITE, SITE], "exempt_token_ids": []}
    assert "names a layer twice" in str(wrong_clamp(twice, n_layers=4, vocab_size=99))
