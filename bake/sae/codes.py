"""What a whole SAE makes of activations, with one block of its weights in memory at a time."""

from __future__ import annotations

import numpy as np

from bake.sae.array_file import ArrayFile
from bake.sae.fit_figures import TIED
from bake.sae.folding import decoder_norms, key_of, size_of
from bake.sae.layouts import SAEFiles
from bake.tensors import Array


def encode(files: SAEFiles, x: Array) -> Array:
    """The activations of every feature.

    Args:
        files: the SAE.
        x: [tokens, d_in], as they stand at its hook point.

    Returns:
        [tokens, d_sae], in the SAE's own units.

    Raises:
        SAEError: a tensor is missing, of the wrong shape, or not finite.
    """
    arrays = ArrayFile.open(files.weights)
    d_in, d_sae = size_of(files)

    def vector(name: str) -> Array:
        return arrays.vector(key_of(files, arrays, name, d_sae))

    x = x * np.float32(files.input_scale)
    if files.apply_b_dec_to_input:
        x = x - arrays.vector(key_of(files, arrays, "b_dec", d_in))
    pre, start = np.zeros((len(x), d_sae), np.float32), 0
    for block in arrays.blocks(key_of(files, arrays, "W_enc", d_in, d_sae)):
        pre += x[:, start : start + len(block)] @ block
        start += len(block)
    if files.topk is not None:
        pre = (pre + vector("b_enc")) * decoder_norms(files, arrays)
        least = np.partition(pre, -files.topk, axis=1)[:, -files.topk, None]
        opened = pre >= least
    elif files.architecture == "gated":
        opened = pre + vector("b_gate") > 0
        pre = pre * np.exp(vector("r_mag")) + vector("b_mag")
    else:
        pre += vector("b_enc")
        opened = pre > (vector("threshold") if files.architecture == "jumprelu" else 0)
    return np.where(opened, np.maximum(pre, 0), np.float32(0))


def decode(files: SAEFiles, acts: Array) -> Array:
    """What activations of every feature stand for: [tokens, d_sae] → [tokens, d_in].

    Raises:
        SAEError: as `encode`.
    """
    arrays = ArrayFile.open(files.weights)
    d_in, d_sae = size_of(files)
    acts = acts / decoder_norms(files, arrays)
    out, start = np.zeros((len(acts), d_in), np.float32), 0
    for block in arrays.blocks(key_of(files, arrays, "W_dec", d_sae, d_in)):
        out += acts[:, start : start + len(block)] @ block
        start += len(block)
    out += arrays.vector(key_of(files, arrays, "b_dec", d_in))
    return out / np.float32(files.input_scale)


def agreement(files: SAEFiles, most: int) -> float:
    """How far encoder columns and decoder rows point the same way, in standard deviations of what
    random directions show: about 0 where they have nothing to do with each other, and 0 where most
    are each other but for scale.

    The mean cosine of n random pairs in d dimensions varies by 1/sqrt(n·d).

    Args:
        files: the SAE.
        most: how many features are looked at, evenly over all.

    Raises:
        SAEError: as `encode`.
    """
    arrays = ArrayFile.open(files.weights)
    d_in, d_sae = size_of(files)
    some = np.unique(np.linspace(0, d_sae - 1, min(most, d_sae)).astype(int)).tolist()
    W_enc = arrays.columns(key_of(files, arrays, "W_enc", d_in, d_sae), some).T.astype(np.float64)
    W_dec = arrays.rows(key_of(files, arrays, "W_dec", d_sae, d_in), some).astype(np.float64)
    lengths = np.linalg.norm(W_enc, axis=1) * np.linalg.norm(W_dec, axis=1)
    cosines = (W_enc * W_dec).sum(1) / np.where(lengths > 0, lengths, 1)
    if np.median(cosines) > TIED:
        return 0.0
    return float(cosines.mean() * np.sqrt(len(some) * d_in))
