"""`bakeout train-sae`: a real SAE of a tiny model, fit to be selected from and baked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake.questions.corpora import Windows
from bake.search.statistics import residuals
from bake.training.standard import Standard, activations_of
from bake.training.train_sae import save_sae, train_config
from bakeout.cli import run
from bakeout.miniature.making.miniature_sae import SAE_TABLE, SCHEDULE, train_site_sae
from bakeout.verbs.demo import MINIATURE
from tests.worlds import RecipeWriter, room_for, tiny_base, tiny_tokenizer, write_texts


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    write_texts(tmp_path / "text.jsonl", 14)

    def write(sae: dict[str, Any] | None = None, **train: Any) -> Path:
        data = {
            "schema": 1,
            "base": {"model": "base", "license": "apache-2.0"},
            "sae": {"hook_point": "blocks.1.hook_resid_post", "d_sae": 64, "k": 6} | (sae or {}),
            "train": {
                "text": {"path": "text.jsonl"},
                "seq_len": 24,
                "n_tokens": 24_000,
                "batch_tokens": 120,
                "learning_rate": 3e-3,
            }
            | train,
        }
        path = tmp_path / "train.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def test_activations_are_read_in_halves(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    ids = torch.randint(3, 90, (8, 10), generator=torch.Generator().manual_seed(0))
    windows = Windows("random", ids.int().numpy(), (0, 1, 2), 8)
    whole = activations_of(model, 1, windows, slice(1, 8))
    with room_for(30, layer=1) as asked:
        found = activations_of(model, 1, windows, slice(1, 8))
    assert asked == [70, 30, 30, 10]
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "standard"])
def test_it_trains_what_can_be_baked(
    write_config: Any, write_recipe: RecipeWriter, tmp_path: Path, architecture: str
) -> None:
    out = tmp_path / "sae"
    found = train_config(write_config({"architecture": architecture}), out)
    sae = SAE.load_from_disk(out)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.architecture() == ("standard" if architecture == "standard" else "jumprelu")
    assert found.fit.variance_explained > 0.5 and found.fit.standardised > 0.5
    if architecture == "batchtopk":
        assert 3 < found.fit.l0 < 12
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 2], "value": -5.0}
    assert run(["bake", str(write_recipe(table)), "--out", str(tmp_path / "baked")]) == 0


def test_the_same_seed_gives_the_same_sae(write_config: Any, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_config(write_config(n_tokens=2400, seed=seed), tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["cfg.json", "sae_weights.safetensors"]
        weights.append([file.read_bytes() for file in files])
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "standard"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    write_config: Any, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    config = write_config({"architecture": architecture}, n_tokens=12_000)
    steps: list[int] = []

    def watch(_: str, share: float) -> None:
        steps.append(round(share * 100))
        if len(steps) == 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_config(config, tmp_path / "sae", watch)
    assert not (tmp_path / "sae").exists()
    again: list[int] = []
    train_config(config, tmp_path / "sae", lambda _, share: again.append(round(share * 100)))
    assert steps[0] == 0 and 0 < again[0] < steps[-1]  # from what was kept on
    train_config(config, tmp_path / "whole")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "sae" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cache" / "train-sae").iterdir())


def test_a_few_large_dimensions_do_not_hide_the_others(
    write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a real Gemma: two dimensions with most of the norm."""
    config, weights = write_config(), tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][:, [3, 11]] *= 200
    save_file(tensors, weights, metadata={"format": "pt"})
    found = train_config(config, tmp_path / "standardised").fit
    monkeypatch.setattr(Standard, "of", lambda *_: Standard(torch.zeros(32), torch.full((32,), 9)))
    bare = train_config(config, tmp_path / "bare").fit
    assert found.standardised is not None and bare.standardised is not None
    assert found.standardised > 0.5 > bare.standardised


def test_folding_changes_no_reconstruction() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=20))
    for tensor in sae.state_dict().values():
        tensor.normal_(generator=generator)
    sae.threshold.data.abs_()
    standard = Standard(torch.randn(8, generator=generator), torch.rand(8, generator=generator) + 1)
    h = torch.randn(50, 8, generator=generator) * 5
    expected = sae.decode(sae.encode(standard.of_tokens(h))) * standard.scale + standard.mean
    standard.fold(sae)
    torch.testing.assert_close(sae.decode(sae.encode(h)), expected, rtol=1e-4, atol=1e-4)
    assert bool((sae.encode(h) > 0).any())
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20))


@pytest.mark.parametrize(
    ("sae", "train", "match"),
    [
        ({"hook_point": "blocks.9.hook_resid_post"}, {}, "has 4 layers"),
        ({"hook_point": "blocks.1.hook_mlp_out"}, {}, "is not supported"),
        ({"width": 3}, {}, "sae.width: unknown key"),
        ({"architecture": "topk"}, {}, "sae.architecture: got 'topk'"),
        ({}, {"n_tokens": 100}, "makes 0 steps of 120; expected at least 4"),
        ({}, {"text": {"path": "none.jsonl"}}, "none.jsonl: cannot be read"),
        ({}, {"seq_len": 5000}, "make no two windows of seq_len 5000"),
        ({"k": 65}, {}, "sae: k is 65, expected at most d_sae"),
        ({}, {"seed": 1 << 40}, "train.seed"),
        ({}, {"learning_rate": 1e30}, "what was trained is not finite"),
    ],
)
def test_bad_configs(
    write_config: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sae: dict[str, Any],
    train: dict[str, Any],
    match: str,
) -> None:
    path = write_config(sae, **train)
    capsys.readouterr()
    assert run(["train-sae", str(path), "--out", str(tmp_path / "sae")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and match in errors[0]
    assert not (tmp_path / "sae").exists()


def test_an_existing_folder_is_not_replaced(
    write_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "mine").write_text("")
    assert run(["train-sae", str(write_config()), "--out", str(tmp_path / "sae")]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_miniature_is_trained_by_the_same_path(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MINIATURE / "model")
    ids = torch.randint(5, 1000, (8, 120), generator=torch.Generator().manual_seed(0))
    h = residuals(model, [0], ids)[0].flatten(0, 1).clone()
    schedule = replace(
        SCHEDULE, sae=SAE_TABLE.model_copy(update={"d_sae": 128}), n_steps=40, batch_size=256
    )
    save_sae(train_site_sae(h, 1, schedule), tmp_path)
    shipped, trained = (
        json.loads((folder / "cfg.json").read_text()) for folder in (MINIATURE / "sae", tmp_path)
    )
    for changing in ("d_sae",):
        shipped.pop(changing), trained.pop(changing)
    for changing in ("l0", "num_dead_features"):
        shipped["metadata"].pop(changing), trained["metadata"].pop(changing, None)
    assert trained == shipped
