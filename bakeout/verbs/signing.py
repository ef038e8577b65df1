"""`bakeout sign`: put a signature beside a folder's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bake.errors import FolderError
from bakeout.terminal import progress
from bakeout.verbs.arguments import FolderPath
from export.code_check import check_code
from export.manifest import Manifest
from export.signing import SigningError, sign_folder
from verify.evidence.integrity import check_integrity


def sign(
    folder: FolderPath,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            help="An elliptic curve's private key. Without one: Sigstore, over the network.",
            show_default=False,
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="The key's signing certificate.", show_default=False),
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(metavar="PEM", help="Certificates that vouch for it.", show_default=False),
    ] = None,
    identity_token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="For Sigstore, instead of a browser.", show_default=False
        ),
    ] = None,
) -> None:
    """Sign a folder's files with a key, a certificate, or an identity (Sigstore)."""
    if certificate is not None and key is None:
        raise SigningError("--certificate: has no private key; expected --key too")
    manifest = Manifest.read(folder)
    check_code(folder, manifest)
    with progress("sign") as advance:
        broken = check_integrity(folder, manifest, lambda share: advance("hash", share))
    if broken:
        raise FolderError(
            f"{folder}: {broken[0].what}; what is not as its manifest says is never signed"
        )
    written = sign_folder(
        folder, key=key, certificate=certificate, chain=chain or (), token=identity_token
    )
    typer.echo(f"written to {written}")
