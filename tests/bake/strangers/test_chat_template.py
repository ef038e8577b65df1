from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bake.errors import ModelError
from bake.strangers import chat_template
from bake.strangers.chat_template import MOST_CHARACTERS, NotRendered, rendered
from tests.worlds import tiny_tokenizer

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FEATURES = (
    "{%- set ns = namespace(n=0, last='') %}{%- for message in messages %}"
    "{% if loop.first %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% generation %}{{ message | tojson }}{% endgeneration %}{{ dict(a=1).a }}"
    "{{ tools is none }} {{ strftime_now('%Y') | length }}{% endfor %}\n  {% if true %}{{ ns.n }}"
    "{% endif %}"
)
CHATS = [
    [{"role": "user", "content": " hello <b>"}],
    [
        {"role": "user", "content": "one"},
        {"role": "model", "content": "tw\u00f6", "name": None},
        {"role": "user", "content": "three"},
    ],
]
BOTH_USER = [{"role": "user", "content": "one"}] * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("template", [GEMMA, FEATURES])
@pytest.mark.parametrize("goes_on", [False, True])
def test_it_says_what_transformers_says(tokenizer: Any, template: str, goes_on: bool) -> None:
    tokenizer.chat_template = template
    found = rendered(tokenizer, CHATS, add_generation_prompt=goes_on)
    assert found == tokenizer.apply_chat_template(
        CHATS, tokenize=False, add_generation_prompt=goes_on
    )


def test_a_chat_that_is_refused_says_why_and_the_others_are_made(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA
    first, second = rendered(tokenizer, [BOTH_USER, CHATS[0]])
    assert isinstance(first, NotRendered) and first.reason == "Conversation roles must alternate"
    assert isinstance(second, str)
    tokenizer.chat_template = "{% if %}"
    (found,) = rendered(tokenizer, CHATS[:1])
    assert isinstance(found, NotRendered)


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__class__ = dict %}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_leaves_its_sandbox(tokenizer: Any, tmp_path: Path, template: str) -> None:
    marker = tmp_path / "marker"
    tokenizer.chat_template = template.replace("MARKER", str(marker))
    (found,) = rendered(tokenizer, CHATS[:1])
    assert isinstance(found, NotRendered), found
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x~n.x %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'x' * 5000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_takes_too_much_is_one_line(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template.render_chats, "CPU_SECONDS", 1)
    tokenizer.chat_template = template
    try:
        (found,) = rendered(tokenizer, CHATS[:1])
        assert isinstance(found, NotRendered), found
        said = found.reason
    except ModelError as error:
        said = str(error)
    assert said and "\n" not in said


def test_a_template_that_is_too_long_is_not_tried(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template.confined, "start", None)
    tokenizer.chat_template = "x" * (MOST_CHARACTERS + 1)
    with pytest.raises(ModelError, match="has 262,145 characters; expected at most 262,144"):
        rendered(tokenizer, CHATS)
    tokenizer.chat_template = {"other": "x"}
    with pytest.raises(ModelError, match="take another tokenizer"):
        rendered(tokenizer, CHATS)
