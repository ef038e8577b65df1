"""Codes of a whole SAE, block by block, against sae_lens's own encode and decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE

from bake.sae import array_file
from bake.sae.codes import agreement, decode, encode
from bake.sae.layouts import open_sae_folder
from tests.worlds import D_IN, D_SAE, TinySAE, save_gemma_scope, save_sae_lens, tiny_sae


def activations() -> np.ndarray:
    x = np.random.default_rng(3).standard_normal((50, D_IN)) * 1.5
    return x.astype(np.float32)


KINDS = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 6},
    "topk by norm": {"k": 9, "rescale_acts_by_decoder_norm": True},
    "topk of all": {"k": D_SAE},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_codes_are_sae_lens_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, apply_b_dec: bool
) -> None:
    monkeypatch.setattr(array_file, "BLOCK_BYTES", 1000)
    folder = save_sae_lens(
        tmp_path / "sae",
        tiny_sae(),
        architecture=kind.partition(" ")[0],
        apply_b_dec_to_input=apply_b_dec,
        **KINDS[kind],
    )
    sae, x = SAE.load_from_disk(folder).double(), activations()
    acts = sae.encode(torch.from_numpy(x).double())
    files = open_sae_folder(folder)
    found = encode(files, x)
    assert np.allclose(found, acts.detach().numpy(), atol=1e-4)
    assert np.allclose(decode(files, found), sae.decode(acts).detach().numpy(), atol=1e-3)


def test_gemma_scope(tmp_path: Path) -> None:
    sae, x = tiny_sae(), activations()
    files = open_sae_folder(save_gemma_scope(tmp_path / "layer_1" / "sae", sae))
    pre = x.astype(np.float64) @ sae.W_enc + sae.b_enc
    acts = np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
    assert np.allclose(encode(files, x), acts, atol=1e-4)
    assert np.allclose(decode(files, encode(files, x)), acts @ sae.W_dec + sae.b_dec, atol=1e-3)


def test_random_directions_do_not_agree_nor_do_tied_ones(tmp_path: Path) -> None:
    far = []
    for seed in range(20):
        files = open_sae_folder(save_sae_lens(tmp_path / str(seed), tiny_sae(seed)))
        far.append(abs(agreement(files, D_SAE)))
    assert max(far) < 4 and sum(far) / 20 > 0.3
    sae = tiny_sae()
    near = sae.W_enc.T + 0.5 * tiny_sae(1).W_enc.T
    dots = (near * sae.W_enc.T).sum(1)
    cosines = dots / np.sqrt((near**2).sum(1) * (sae.W_enc**2).sum(0))
    for W_dec, expected in ((near, cosines.mean() * (D_IN * D_SAE) ** 0.5), (3 * sae.W_enc.T, 0)):
        made = TinySAE(
            sae.W_enc, sae.b_enc, W_dec.astype("f4", order="C"), sae.b_dec, sae.threshold
        )
        files = open_sae_folder(save_sae_lens(tmp_path / f"near {expected}", made))
        assert agreement(files, D_SAE) == pytest.approx(expected, rel=1e-4)
