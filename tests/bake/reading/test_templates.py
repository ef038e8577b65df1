"""Chat templates run where they can be stopped."""

from __future__ import annotations

from typing import Any

import pytest

from bake.reading import templates
from bake.reading.capped import UnreadableError
from bake.reading.templates import rendered
from tests.worlds import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Grüße 🔥"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_template_says_what_transformers_says(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    for options in ({}, {"add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert rendered(tokenizer, MESSAGES, **options) == expected
    long = [{"role": "user", "content": "x" * 300_000}]
    assert len(rendered(tokenizer, long)) > 300_000


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.5 s"),
        ("{{ 7 ** 7 ** 7 ** 7 ** 7 ** 7 }}{{ (9 ** 9999) ** 99999 }}", "0.5 s"),
        ("{{ 'a' * 10000000000 }}", "more memory"),
        ("{{ raise_exception('roles in turn') }}", "roles in turn"),
        ("{% for", "unexpected|Expected|expected"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * 2000000 }}", "writes more than 1,048,576"),
    ],
)
def test_a_template_that_runs_away_is_stopped(
    template: str, match: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "0.5 s" in match:
        monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "_TEXT", 1 << 20)
    tokenizer.chat_template = template
    with pytest.raises(UnreadableError, match=match):
        rendered(tokenizer, MESSAGES)
