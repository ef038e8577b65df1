"""Statistics against a plain loop over sae_lens's own encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

import bake.search.statistics as search
from bake.errors import RanOutError, SAEError
from bake.questions.corpora import Windows
from bake.recipe import Recipe
from bake.sae.folding import load_encoder
from bake.sae.layouts import find_sae
from bake.search.corpus_statistics import Material, measure
from bake.search.statistics import (
    BINS,
    CONTEXTS,
    NEAR,
    FeatureSite,
    FeatureStatistics,
    bin_edges,
    check_memory,
    residuals,
)
from bakeout.verbs.demo import MINIATURE
from tests.bake.scale.counted import statistics
from tests.worlds import (
    FAMILIES,
    VOCAB,
    TinySAE,
    notes,
    room_for,
    save_sae_lens,
    tiny_base,
    tiny_sae,
)

SPECIAL = (0, 1, 2)


def random_windows(n: int = 21, seq: int = 13, seed: int = 0) -> Windows:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB - 4, (n, seq)).astype(np.int32)
    ids[:, 0] = 2
    return Windows("random", ids, SPECIAL, n)


def encoder_of(folder: Path) -> Any:
    clamp = {"sae": {"path": folder.name}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    recipe = Recipe.parse(data, name="test", folder=folder.parent)
    return load_encoder(find_sae(recipe.clamp[0].sae, recipe))


def plain_codes(model: Any, sae: Any, layer: int, windows: Windows) -> tuple[Any, Any]:
    """(activations, pre-activation minus threshold), float64, [windows, seq, d_sae]."""
    ids = torch.from_numpy(windows.ids.astype(np.int64))
    with torch.no_grad():
        h = model(ids, output_hidden_states=True).hidden_states[layer + 1].double()
        sae = sae.double()
        acts = sae.encode(h)
        x = h - sae.b_dec if sae.cfg.apply_b_dec_to_input else h
        gap = x @ sae.W_enc + sae.b_enc
    if hasattr(sae, "threshold"):
        gap = gap - sae.threshold
    return acts.numpy(), gap.detach().numpy()


def assert_same(found: FeatureStatistics, acts: Any, gap: Any, windows: Windows) -> None:
    """Against sums over a plain loop; counts may differ only where a threshold is that near."""
    counted = windows.counts(windows.ids)
    assert found.n_tokens == counted.sum() == windows.n_tokens
    a = acts[counted]
    near = (np.abs(gap[counted]) <= NEAR).sum(0)
    listed = np.flatnonzero(near)
    differing = np.flatnonzero(found.fired != (a > 0).sum(0))
    assert set(differing) <= set(listed), f"near the threshold: {listed}; differing: {differing}"
    fine = np.setdiff1d(np.arange(a.shape[1]), listed)
    np.testing.assert_allclose(found.mean[fine], a.mean(0)[fine], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.mean_square[fine], (a**2).mean(0)[fine], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.maximum[fine], a.max(0)[fine], rtol=1e-4, atol=1e-5)
    assert (found.histogram.sum(1) == found.fired).all()
    per_window = np.where(counted[..., None], acts, 0).max(1)  # [windows, d_sae]
    best = -np.sort(-per_window, axis=0)[:CONTEXTS]
    np.testing.assert_allclose(found.top_values[: len(best), fine], best[:, fine], atol=1e-4)
    seq = windows.ids.shape[1]
    for feature in fine[:: max(1, len(fine) // 40)]:
        for value, place in zip(
            found.top_values[:, feature], found.top_places[:, feature], strict=True
        ):
            assert (place >= 0) == (value > 0)
            if place >= 0:
                assert abs(acts[place // seq, place % seq, feature] - value) < 1e-4
                assert counted[place // seq, place % seq]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
def test_statistics_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, architecture: str
) -> None:
    monkeypatch.setattr("bake.search.statistics.BATCH_TOKENS", 60)  # several batches
    monkeypatch.setattr("bake.search.statistics.BLOCK_BYTES", 4 * 52 * 10)
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base", family))
    folder = save_sae_lens(tmp_path / "sae", tiny_sae(), layer=2, architecture=architecture)
    windows = random_windows()
    (found,) = statistics(model, [FeatureSite(2, encoder_of(folder))], windows)
    sae = SAE.load_from_disk(folder)
    acts, gap = (
        plain_codes_gated(model, sae, windows)
        if architecture == "gated"
        else plain_codes(model, sae, 2, windows)
    )
    assert 0.01 < found.share.mean() < 0.9
    assert_same(found, acts, gap, windows)


def plain_codes_gated(model: Any, sae: Any, windows: Windows) -> tuple[Any, Any]:
    ids = torch.from_numpy(windows.ids.astype(np.int64))
    with torch.no_grad():
        h = model(ids, output_hidden_states=True).hidden_states[3].double()
        acts = sae.double().encode(h)
    return acts.numpy(), np.where(acts.numpy() > 0, 1.0, -1.0)


def test_several_hook_points_in_one_pass_that_ends_at_the_last(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encoders = [
        encoder_of(save_sae_lens(tmp_path / f"sae{i}", tiny_sae(i), layer=i)) for i in (0, 2)
    ]
    windows = random_windows(3)
    both = statistics(model, [FeatureSite(0, encoders[0]), FeatureSite(2, encoders[1])], windows)
    assert ran == [0, 1, 2]
    (alone,) = statistics(model, [FeatureSite(2, encoders[1])], windows)
    for name, array in vars(alone).items():
        assert np.array_equal(getattr(both[1], name), array), name


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    ids = torch.tensor([[2, 5, 6, 7]])
    padded, mask = torch.tensor([[0, 0, 2, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = residuals(model, [1], ids)[1]
    found = residuals(model, [1], padded, mask)[1][:, 2:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_activation_at_its_threshold_is_decided_in_float64_and_listed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    windows = random_windows(4)
    sae = tiny_sae()
    h = residuals(model, [1], torch.from_numpy(windows.ids.astype(np.int64)))[1].double().numpy()
    pre = (h - sae.b_dec.astype(np.float64)) @ sae.W_enc.astype(np.float64) + sae.b_enc
    sae.threshold[:] = np.maximum(pre[0, 3], 0.05).astype(np.float32)  # on the edge, as can be
    folder = save_sae_lens(tmp_path / "sae", sae)
    (found,) = statistics(model, [FeatureSite(1, encoder_of(folder))], windows)
    on_edge = pre[0, 3] > 0.05
    assert on_edge.sum() > 10 and (found.near[on_edge] >= 1).all()
    acts, gap = plain_codes(model, SAE.load_from_disk(folder), 1, windows)
    assert_same(found, acts, gap, windows)


def test_histogram_bins() -> None:
    edges = bin_edges()
    assert len(edges) == BINS + 1 and edges[0] == 2**-6 and edges[-1] == 2**10


def test_an_sae_of_another_width_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    site = FeatureSite(1, encoder_of(save_sae_lens(tmp_path / "sae", tiny_sae(d_in=16))))
    with pytest.raises(SAEError, match="d_in is 16, the model's hidden size is 32"):
        statistics(model, [site], random_windows(2))


def test_an_sae_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory("small", 32, 64)
    monkeypatch.setattr("bake.search.statistics.available_memory", lambda *_: 2_000_000_000)
    with pytest.raises(SAEError, match=r"SAE wide: d_sae 1,048,576 .* needs 1\d\.\d GB .* 2\.0 GB"):
        check_memory("wide", 2304, 1 << 20)


def test_memory_that_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    sites = [
        FeatureSite(layer, encoder_of(save_sae_lens(tmp_path / f"sae{layer}", tiny_sae(layer))))
        for layer in (1, 2)
    ]
    windows = random_windows()
    whole = statistics(model, sites, windows)
    assert notes(capsys) == []
    with room_for(70, layer=2) as asked:
        found = statistics(model, sites, windows)
    assert asked[:4] == [21 * 13, 10 * 13, 5 * 13, 5 * 13] and max(asked[2:]) == 65
    assert notes(capsys) == [
        "note: reading windows: memory ran out at 21 at once; going on with 10",
        "note: reading windows: memory ran out at 10 at once; going on with 5",
    ]
    strongest = search.strongest

    def limited(values: Any, places: Any) -> Any:  # what a block ends with
        if values.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return strongest(values, places)

    monkeypatch.setattr(search, "strongest", limited)
    in_blocks = statistics(model, sites, windows)
    assert (
        notes(capsys)[1]
        == "note: counting features: memory ran out at 32 at once; going on with 16"
    )
    for one, *others in zip(whole, found, in_blocks, strict=True):
        assert one.fired.sum() > 100
        for other in others:
            for name in ("fired", "near", "histogram", "top_places"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
            np.testing.assert_allclose(other.total, one.total, rtol=1e-5)
    with room_for(12, layer=0), pytest.raises(RanOutError, match="reading windows: memory ran out"):
        statistics(model, sites, windows)


def test_the_miniature_counts_as_sae_lens_counts(tmp_path: Path) -> None:
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    material = Material(recipe)
    measured = measure(recipe, material=material, cache=tmp_path)
    (site,) = measured.sites
    sae = SAE.load_from_disk(MINIATURE / "sae")
    for side in ("forget", "retain"):
        whole = measured.corpora[side]
        part = Windows("part", whole.ids[:64], whole.special_ids, 0)
        (found,) = statistics(
            material.model, [FeatureSite(site.site.layer, load_encoder(site.site.files))], part
        )
        acts, gap = plain_codes(material.model, sae, site.site.layer, part)
        assert_same(found, acts, gap, part)
        assert getattr(site, side).n_tokens == whole.n_tokens


def tiny_dead(sae: TinySAE) -> TinySAE:
    sae.threshold[:] = 1e9
    return sae


def test_features_that_never_fire_have_no_contexts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    folder = save_sae_lens(tmp_path / "sae", tiny_dead(tiny_sae()))
    (found,) = statistics(model, [FeatureSite(1, encoder_of(folder))], random_windows(2))
    assert not found.fired.any() and not found.maximum.any() and (found.top_places == -1).all()
