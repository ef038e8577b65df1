"""Any SAE, cut down to the features that a clamp needs, with everything foldable folded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bake.errors import SAEError
from bake.sae.array_file import ArrayFile
from bake.sae.layouts import SAEFiles
from bake.tensors import Array, StoredTensor, stored_tensors, to_bits

_OWN = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
}
"""Tensors of each architecture besides W_enc, W_dec and b_dec."""


@dataclass(frozen=True)
class SAESlice:
    """A few features of an SAE: everything that their activations and directions depend on."""

    W_enc: Array = field(repr=False)
    """[d_in, k]."""
    b_enc: Array = field(repr=False)
    """[k], with b_dec and input normalisation folded in."""
    theta: Array = field(repr=False)
    """[k], JumpReLU threshold; 0 is ReLU."""
    W_dec: Array = field(repr=False)
    """[k, d_in]."""
    features: tuple[int, ...]
    """The k features, in the order of the arrays."""
    architecture: str
    sha256: str
    """Of the SAE's weights file."""
    whole: WholeEncoder | None = None
    """topk only; `b_enc` is then [d_sae], in its order, and `W_enc` and `theta` are empty."""


@dataclass(frozen=True)
class WholeEncoder:
    """The encoder of a TopK SAE as it is stored: every feature has a say in which are active."""

    stored: StoredTensor
    """[d_in, d_sae]."""
    order: NDArray[np.int64] = field(repr=False)
    """[d_sae] its columns: those of the k features first, then all others."""
    gain: Array = field(repr=False)
    """[d_sae], in that order: what x @ W_enc is multiplied by."""
    topk: int
    """How many features are active on a token."""

    @property
    def dtype(self) -> str:
        """As safetensors names it: its own, or F32 for F64."""
        return "F32" if self.stored.dtype == "F64" else self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_in, d_sae)."""
        return self.stored.shape

    def blocks(self) -> Iterator[bytes]:
        """Its bytes in that order, a few rows at a time."""
        for start, stop in self.stored.blocks():
            bits = self.stored.bits(start, stop)
            bits = to_bits(bits.view(np.float64), "F32") if self.stored.dtype == "F64" else bits
            yield bits[:, self.order].tobytes()


@dataclass(frozen=True)
class SAEEncoder:
    """What the activations of every feature of an SAE depend on."""

    W_enc: Array = field(repr=False)
    """[d_in, d_sae]."""
    b_enc: Array = field(repr=False)
    """[d_sae], folded."""
    theta: Array = field(repr=False)
    """[d_sae], at least 0: a feature fires where pre > theta, and its activation is then pre."""
    sha256: str
    """Of the SAE's weights file."""


def size_of(files: SAEFiles) -> tuple[int, int]:
    """(d_in, d_sae) of an SAE, from its file's directory."""
    arrays = ArrayFile.open(files.weights)
    shape = arrays.shapes.get(_key(files, "W_enc"), ())
    if len(shape) != 2 or 0 in shape:
        raise SAEError(
            f"SAE file {files.weights}: W_enc has shape {list(shape)}; expected [d_in, d_sae]. "
            "Download it again"
        )
    if files.stated_size not in (None, shape):
        raise SAEError(
            f"SAE file {files.weights}: W_enc has shape {list(shape)}, but its config states "
            f"{list(files.stated_size or ())} (d_in, d_sae); expected the two to agree. Save the "
            "SAE again with sae_lens"
        )
    _check_names(files, arrays)
    return shape[0], shape[1]


def _check_names(files: SAEFiles, arrays: ArrayFile) -> None:
    """Refuse tensors that nothing here reads: an SAE that has more computes something else."""
    known = {_key(files, name) for name in ("W_enc", "W_dec", "b_dec", *_OWN[files.architecture])}
    more = set(arrays.shapes) - known
    if "scaling_factor" in more:  # sae_lens 2 and 3 wrote it, as ones mostly
        if not np.allclose(arrays.vector("scaling_factor"), 1):
            raise SAEError(
                f"SAE file {files.weights}: scaling_factor is not 1 throughout, so activations "
                "are multiplied after the ReLU, which sae_lens 6 does not load; expected none. "
                "Multiply it into W_dec's rows, and save the SAE without it"
            )
        more.remove("scaling_factor")
    if more:
        raise SAEError(
            f"SAE file {files.weights}: holds {', '.join(sorted(more))} too, which an SAE of "
            f"architecture {files.architecture} does not have; expected "
            f"{', '.join(sorted(known))}. Take another SAE"
        )


def load_slice(files: SAEFiles, features: Sequence[int]) -> SAESlice:
    """Read the given features of an SAE, folded, in its own activation units.

    Raises:
        SAEError: a tensor is missing, of the wrong shape, or not finite anywhere in the file.
    """
    arrays, k = ArrayFile.open(files.weights), list(features)
    d_in, d_sae = size_of(files)
    W_dec = arrays.rows(key_of(files, arrays, "W_dec", d_sae, d_in), k)
    whole = None
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # looked for below
        if files.topk is not None:
            whole, b_enc = _whole_encoder(files, arrays, k)
            W_enc, theta = np.empty((d_in, 0), np.float32), np.empty(0, np.float32)
            W_dec = W_dec / decoder_norms(files, arrays)[k, None]
        else:
            W_enc, b_enc, theta = _encoder(files, arrays, k)
        W_dec = W_dec if files.input_scale == 1.0 else W_dec / np.float32(files.input_scale)
    folded = {"W_enc": W_enc, "b_enc": b_enc, "theta": theta, "W_dec": W_dec}
    if whole is not None:
        folded["gain"] = whole.gain
    for name, array in folded.items():
        if not np.isfinite(array).all():
            raise SAEError(
                f"SAE file {files.weights}: {name}, with all folded into it, is beyond float32; "
                "expected finite numbers. Download it again, or take another SAE"
            )
    return SAESlice(
        W_enc,
        b_enc,
        theta,
        W_dec,
        tuple(k),
        files.architecture,
        sha256_of(files),
        whole,
    )


def load_encoder(files: SAEFiles) -> SAEEncoder:
    """Read the encoder of every feature, folded, in the SAE's own activation units.

    Raises:
        SAEError: as `load_slice`; or it is a TopK SAE, whose features are not told one by one.
    """
    if files.topk is not None:
        raise SAEError(
            f"SAE file {files.weights}: is a TopK SAE, which select, sweep and features do not "
            "take; expected one whose features are active by "
            "themselves. Name the features, or take a JumpReLU SAE"
        )
    W_enc, b_enc, theta = _encoder(files, ArrayFile.open(files.weights), None)
    return SAEEncoder(W_enc, b_enc, np.maximum(theta, 0), sha256_of(files))


def load_decoder(files: SAEFiles) -> Array:
    """Read the decoder row of every feature, folded: [d_sae, d_in]."""
    arrays = ArrayFile.open(files.weights)
    d_in, d_sae = size_of(files)
    key = key_of(files, arrays, "W_dec", d_sae, d_in)
    W_dec = arrays.matrix(key)
    return W_dec if files.input_scale == 1.0 else W_dec / np.float32(files.input_scale)


def decoder_norms(files: SAEFiles, arrays: ArrayFile) -> Array:
    """[d_sae] what activations are multiplied by, and decoder rows divided by: 1 mostly.

    Raises:
        SAEError: one is 0.
    """
    d_in, d_sae = size_of(files)
    if not files.by_decoder_norm:
        return np.ones(d_sae, np.float32)
    blocks = arrays.blocks(key_of(files, arrays, "W_dec", d_sae, d_in))
    norms = [np.sqrt(np.square(block.astype(np.float64)).sum(1)) for block in blocks]
    lengths = np.concatenate(norms).astype(np.float32)
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        raise SAEError(
            f"SAE file {files.weights}: W_dec row {row} is zero, by whose length its activations "
            "are divided; expected none. Save the SAE without rescale_acts_by_decoder_norm, its "
            "norms folded in"
        )
    return lengths


def sha256_of(files: SAEFiles) -> str:
    """sha256 of the SAE's weights file."""
    with files.weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encoder(files: SAEFiles, arrays: ArrayFile, k: list[int] | None) -> tuple[Array, Array, Array]:
    """(W_enc [d_in, k], b_enc [k], theta [k]) of some features, or of all, folded."""
    d_in, d_sae = size_of(files)

    def vector(name: str) -> Array:
        whole = arrays.vector(key_of(files, arrays, name, d_sae))
        return whole if k is None else whole[k]

    key = key_of(files, arrays, "W_enc", d_in, d_sae)
    W_enc = arrays.matrix(key) if k is None else arrays.columns(key, k)
    b_dec = arrays.vector(key_of(files, arrays, "b_dec", d_in))
    if files.architecture == "gated":
        W_enc, b_enc, theta = _gate_as_threshold(
            W_enc, vector("b_gate"), vector("b_mag"), vector("r_mag")
        )
    elif files.architecture == "jumprelu":
        b_enc, theta = vector("b_enc"), vector("threshold")
    else:
        b_enc = vector("b_enc")
        theta = np.zeros_like(b_enc)
    if files.input_scale != 1.0:
        # encode(s·x) as an encoder of x. Source: sae_lens, fold_activation_norm_scaling_factor.
        W_enc = W_enc * np.float32(files.input_scale)
        b_dec = b_dec / np.float32(files.input_scale)
    if files.apply_b_dec_to_input:
        b_enc = _fold_b_dec(b_enc, b_dec, W_enc)
    return W_enc, b_enc, theta


def _whole_encoder(files: SAEFiles, arrays: ArrayFile, k: list[int]) -> tuple[WholeEncoder, Array]:
    """(The encoder of a TopK SAE, b_enc [d_sae] in its order, folded)."""
    assert files.topk is not None and files.input_scale == 1.0
    d_in, d_sae = size_of(files)
    key = key_of(files, arrays, "W_enc", d_in, d_sae)
    b_dec = arrays.vector(key_of(files, arrays, "b_dec", d_in)).astype(np.float64)
    bias = arrays.vector(key_of(files, arrays, "b_enc", d_sae)).astype(np.float64)
    start = 0
    for block in arrays.blocks(key):  # which looks at every number
        if files.apply_b_dec_to_input:
            bias -= b_dec[start : start + len(block)] @ block
        start += len(block)
    norms = decoder_norms(files, arrays).astype(np.float64)
    order = np.concatenate([k, np.setdiff1d(np.arange(d_sae), k)]).astype(np.int64)
    gain = norms.astype(np.float32)
    whole = WholeEncoder(stored_tensors(files.weights)[key], order, gain[order], files.topk)
    return whole, (bias * norms).astype(np.float32)[order]


def key_of(files: SAEFiles, arrays: ArrayFile, name: str, *shape: int) -> str:
    """A tensor's key, once its shape is what it has to be."""
    key = _key(files, name)
    if arrays.shapes.get(key) != shape:
        got = list(arrays.shapes[key]) if key in arrays.shapes else "nothing"
        raise SAEError(
            f"SAE file {files.weights}: {key} has shape {got}; expected {list(shape)}. "
            "Download it again"
        )
    return key


# ------------------------------------------------------------------------------- the folding


def _gate_as_threshold(
    W_enc: Array, b_gate: Array, b_mag: Array, r_mag: Array
) -> tuple[Array, Array, Array]:
    """A gated SAE as JumpReLU.

    It fires where x·W + b_gate > 0, with activation relu(x·W·exp(r) + b_mag). Multiplying the
    gate by exp(r) > 0 gives pre > b_mag - b_gate·exp(r) for pre = x·W·exp(r) + b_mag.
    """
    gain = np.exp(r_mag.astype(np.float64))
    theta = b_mag.astype(np.float64) - b_gate * gain
    return (W_enc * gain).astype(np.float32), b_mag, theta.astype(np.float32)


def _fold_b_dec(b_enc: Array, b_dec: Array, W_enc: Array) -> Array:
    """(x - b_dec) @ W_enc + b_enc  =  x @ W_enc + (b_enc - b_dec @ W_enc)."""
    return (b_enc - b_dec.astype(np.float64) @ W_enc).astype(np.float32)


def _key(files: SAEFiles, name: str) -> str:
    return name.replace("W_", "w_") if files.lower_case else name
