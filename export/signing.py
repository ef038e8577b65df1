"""A folder's signature, `model.sig`: who says that these are its files.

Made and checked by the OpenSSF's `model-signing`, whose own command line checks it too. It covers
every file of the folder, `manifest.json` among them, but not itself and not what git and the hub's
downloader put there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import BakeoutError, short
from bake.files.folder_files import PARTIAL, SIGNATURE
from bake.new_folder import MANIFEST
from bake.reading.capped import parse_json, read_bytes, read_in
from export.in_place import changing

_NOT_SIGNED = (SIGNATURE, ".cache/huggingface", PARTIAL, f"{PARTIAL}.lock")
_MOST_BYTES = 1 << 20
"""Of a key, a certificate or a signature."""


class SigningError(BakeoutError):
    """A key or certificate that cannot be used, or model-signing is not installed."""


class SignatureError(SigningError):
    """A signature that is not there, or does not hold."""


@dataclass(frozen=True)
class Trust:
    """Whose signature is expected: one of three."""

    key: Path | None = None
    """PEM file of a public key, of an elliptic curve."""
    roots: Path | None = None
    """PEM file of the certificates that signing certificates must come from."""
    identity: tuple[str, str] | None = None
    """(identity, issuer) as Sigstore knows them."""

    @classmethod
    def parse(cls, text: str) -> Trust:
        """What `--signature` takes: a PEM file, or `IDENTITY,ISSUER`.

        Raises:
            SigningError: it is neither.
        """
        path = Path(text)
        identity, comma, issuer = text.rpartition(",")
        if comma and issuer.startswith("https://") and identity and not path.exists():
            return cls(identity=(identity, issuer))
        data = _pem(path)
        if b"-----BEGIN PUBLIC KEY-----" in data:
            return cls(key=path)
        if b"-----BEGIN CERTIFICATE-----" in data:
            return cls(roots=path)
        raise SigningError(
            f"{path}: holds no public key and no certificate; expected a PEM file, or "
            "IDENTITY,ISSUER for Sigstore"
        )


def sign_folder(
    folder: Path,
    *,
    key: Path | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
    token: str | None = None,
) -> Path:
    """Sign a folder whose files are known to be what its manifest lists.

    Args:
        folder: what bakeout wrote.
        key: PEM file of a private key, of an elliptic curve and without a password. Without one,
            Sigstore is asked, which needs the network.
        certificate: PEM file of the key's signing certificate.
        chain: PEM files of those that vouch for it.
        token: of an identity, for Sigstore; without one a browser is opened.

    Returns:
        The signature's path.

    Raises:
        SigningError: key or certificate cannot be used, Sigstore cannot be reached, or
            model-signing is not installed.
    """
    signing, _, hashing = _library()
    config = signing.Config().set_hashing_config(
        hashing.Config().set_ignored_paths(paths=_NOT_SIGNED).set_allow_symlinks(True)
    )
    for path in (key, certificate, *chain):
        if path is not None:
            _pem(path)
    expected = "expected an elliptic curve's key in PEM, without a password"
    with _one_line("cannot sign", expected, SigningError):
        if key is None:
            config.use_sigstore_signer(identity_token=token)
        elif certificate is None:
            config.use_elliptic_key_signer(private_key=key)
        else:
            config.use_certificate_signer(
                private_key=key,
                signing_certificate=certificate,
                certificate_chain=chain or [certificate],  # none at all is refused
            )
    with changing(folder) as partial:
        with _one_line("cannot sign", "check the network, or sign with a key", SigningError):
            config.sign(folder, partial / SIGNATURE)
        (partial / SIGNATURE).replace(folder / SIGNATURE)
    return folder / SIGNATURE


def check_signature(folder: Path, trust: Trust) -> str:
    """Check a folder's signature against all of its files, which are hashed for it.

    Args:
        folder: what is said to be signed; links in it were looked at.
        trust: by whom.

    Returns:
        The signer: a key's sha256, a certificate's subject, or an identity and its issuer.

    Raises:
        SignatureError: there is none, it is damaged, somebody else's or of other files.
        SigningError: model-signing is not installed, or the key cannot be used.
    """
    _, verifying, hashing = _library()
    with _one_line(f"{SIGNATURE} cannot be read", "expected what `bakeout sign` writes"):
        bundle = parse_json(read_in(folder, SIGNATURE))
        payload = parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        signed = {of["name"] for of in payload["predicate"]["resources"]}
        hashed = _as_hashed(hashing.Config(), payload["predicate"]["serialization"])
    config = verifying.Config().set_hashing_config(hashed)
    expected = "expected an elliptic curve's key or certificates, or a network"
    with _one_line("--signature", expected, SigningError):
        if trust.key is not None:
            config.use_elliptic_key_verifier(public_key=trust.key)
        elif trust.roots is not None:
            config.use_certificate_verifier(certificate_chain=[trust.roots])
        elif trust.identity is not None:
            identity, issuer = trust.identity
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    with _one_line(f"{SIGNATURE} does not hold", "do not use this folder"):
        config.verify(folder, folder / SIGNATURE)
        if MANIFEST not in signed:  # which has the hash of every other file
            raise ValueError(f"it does not cover {MANIFEST}")
        return _signer(trust, bundle["verificationMaterial"])


def _as_hashed(config: Any, said: dict[str, Any]) -> Any:
    """How to hash a folder again: as its signature says, but through the links of the hub's cache.
    The library's own guess, model-signing 1.1, forgets that these may be followed.
    """
    options = {"hashing_algorithm": said["hash_type"], "allow_symlinks": True}
    if said["method"] == "shards":
        config.use_shard_serialization(**options, shard_size=said["shard_size"])
    else:
        config.use_file_serialization(**options)
    return config.set_allow_symlinks(True)


def _signer(trust: Trust, material: dict[str, Any]) -> str:
    """Who signed, once that was checked."""
    if trust.identity is not None:
        return " of ".join(trust.identity)
    if trust.key is not None:
        return f"key {hashlib.sha256(_pem(trust.key)).hexdigest()[:16]}"
    from cryptography import x509

    (first, *_) = material["x509CertificateChain"]["certificates"]
    found = x509.load_der_x509_certificate(base64.b64decode(first["rawBytes"]))
    return str(found.subject.rfc4514_string())


def _library() -> tuple[Any, Any, Any]:
    """model-signing's signing, verifying and hashing."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise SigningError("model-signing is not installed; pip install 'bakeout[sign]'") from error
    return signing, verifying, hashing


def _pem(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SigningError(f"{path}: cannot be read ({reason}); expected a PEM file") from error


@contextmanager
def _one_line(what: str, remedy: str, kind: type[SigningError] = SignatureError) -> Iterator[None]:
    """Whatever the library raises becomes one line."""
    try:
        yield
    except SigningError:
        raise
    except Exception as error:  # its own kinds, cryptography's, OpenSSL's and Sigstore's
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise kind(f"{what} ({reason}); {remedy}") from error
