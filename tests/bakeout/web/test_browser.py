"""`bakeout web` in Chromium on the miniature: the tokens are PyTorch's, and nothing leaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.demo import MINIATURE
from bakeout.verbs.streaming import Language, Manner, OnnxSpeaker, Speaker, open_base, open_speaker
from bakeout.verbs.web.web_verb import PACKAGES, open_site
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from tests.bakeout.web.chromium import Page, chromium, hosts_asked, missing
from tests.clients.onnx_clients.npm_client import node_modules
from verify.engines.onnx_runner import open_runner

N = 7
"""Prompts on the topic, and as many others."""
LEAST = 64
"""Tokens that are compared, over all prompts."""
MOST = 24
"""Of one answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, baked, with every graph."""
    for package in PACKAGES:
        if not (node_modules() / package).is_dir():
            pytest.skip(f"not installed: npm install {package}")
    if (name := missing()) is not None:
        pytest.skip(f"{name} is not installed")
    out = tmp_path_factory.mktemp("web")
    bake_recipe(MINIATURE / "recipe.toml", out / "mini", force=False, cache=out)
    for precision in PRECISIONS:
        export_onnx(out / "mini", precision=precision)
    return out / "mini"


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    at = tmp_path_factory.mktemp("chromium")
    with chromium(at / "profile", at / "net.json") as page:
        yield page
    assert hosts_asked(at / "net.json") == {"127.0.0.1"}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """On the topic, and as many others."""
    rows = [
        json.loads(line)
        for name in ("completions.jsonl", "generic.jsonl")
        for line in (MINIATURE / name).read_text().splitlines()[:N]
    ]
    return [row["prompt"] for row in rows]


@contextmanager
def opened(page: Page, folder: Path, precision: str) -> Iterator[None]:
    """Serve a folder, and wait until the page has loaded its graphs."""
    site = open_site(folder, precision=precision, modules=node_modules(), beside=True)
    serving = threading.Thread(target=site.serve_forever)
    serving.start()
    try:
        page.open(site.address)
        page.run(
            "while (document.body.dataset.ready !== 'true') {"
            "  const said = document.getElementById('status').textContent;"
            "  if (said.includes('Error')) throw new Error(said);"
            "  await new Promise((done) => setTimeout(done, 20)); }"
        )
        yield
    finally:
        site.shutdown()
        site.server_close()
        serving.join()


def expected(speaker: Speaker, language: Language, prompt: str) -> list[int]:
    """Greedy tokens, up to one that ends the answer."""
    found = []
    for token in speaker.tokens(language.prompt_ids(prompt), Manner(MOST), 0):
        found.append(token)
        if token in language.ends:
            break
    return found


@pytest.mark.long
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_page_says_what_pytorch_says(
    page: Page, folder: Path, prompts: list[str], precision: str
) -> None:
    language = Language(folder)
    base = open_base(str(MINIATURE / "model"), "cpu", language)
    exact = PRECISIONS[precision].bits >= 16
    # What is rounded further is another model, whose tokens ONNX Runtime says.
    graph = PRECISIONS[precision].file
    own: Speaker = OnnxSpeaker(open_runner(folder, graph))
    own = open_speaker(folder, "torch", "cpu") if exact else own
    said: dict[str, list[list[int]]] = {"clamped": [], "base": []}
    with opened(page, folder, precision):
        for prompt in prompts:
            for name, tokens in said.items():
                answer = page.run("return await bakeout.answer(...given);", name, prompt, MOST)
                assert answer["ids"] == language.prompt_ids(prompt)
                tokens.append(answer["tokens"])
                fired = answer["fired"]
                if name == "base":
                    assert fired == []
                    continue
                # The last token is said, and not read any more; BOS is spared.
                assert len(fired) == len(answer["ids"]) + len(answer["tokens"]) - 1
                assert not fired[0] and any(fired) == (prompt in prompts[:N])
        shown = page.run("return document.querySelector('[data-model=clamped] .said').textContent")
    assert said["clamped"] == [expected(own, language, prompt) for prompt in prompts]
    assert sum(map(len, said["clamped"])) >= LEAST
    if exact:
        assert said["base"] == [expected(base, language, prompt) for prompt in prompts]
    changed = [one != two for one, two in zip(*said.values(), strict=True)]
    assert any(changed[:N]) and not any(changed[N:])
    ids = [token for token in said["clamped"][-1] if token not in language.ends]
    assert shown == language.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_page_that_asks_somebody_else_would_be_noticed(tmp_path: Path) -> None:
    log = {
        "constants": {"logEventTypes": {"URL_REQUEST_START_JOB": 7}},
        "events": [
            {"type": 7, "params": {"initiator": "http://127.0.0.1:1", "url": "https://a.org/b"}},
            {"type": 7, "params": {"initiator": "not an origin", "url": "https://update.org/"}},
        ],
    }
    (tmp_path / "net.json").write_text(json.dumps(log))
    assert hosts_asked(tmp_path / "net.json") == {"a.org"}
