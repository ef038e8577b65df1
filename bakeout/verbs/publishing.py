"""`bakeout card`, `sign` and `push`: a folder's card from what was measured, its signature, and
its upload.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from bake.errors import BakeoutError, FolderError, ReportError
from bake.files.folder_files import SIGNATURE, file_in, open_in
from bake.new_folder import MANIFEST, write_whole
from bake.reading.capped import read_in
from bakeout.terminal import printable, progress
from bakeout.verbs.arguments import FolderPath
from export.clamped import is_heavy
from export.code_check import check_code
from export.folder_contents import read_listed
from export.in_place import changing, put_files
from export.manifest import AGAIN, CARD, Manifest
from export.signing import SigningError, sign_folder
from model_cards.bom import bom_of
from model_cards.facts import facts_of_folder
from model_cards.render import render
from verify.audit.audit_report import audit_of
from verify.evidence.integrity import check_integrity
from verify.report.findings import VerifyReport
from verify.report.reading import check_fresh, read_report

Advance = Callable[[float], None]


class PushError(BakeoutError):
    """An upload that the hub refused, or that did not reach it."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    """(name, bytes), the manifest last."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


# --------------------------------------------------------------------------- card


def card_folder(
    folder: Path, report_file: Path | None, advance: Advance, audit_file: Path | None = None
) -> Path:
    """Write a folder's README.md anew, from its manifest and reports of it.

    Args:
        folder: what bakeout wrote.
        report_file: what `bakeout verify --json` wrote; without one, nothing was measured.
        advance: called with the share of bytes hashed so far.
        audit_file: what `bakeout audit --json` wrote; without one, nobody tried to get it back.

    Raises:
        ReportError: a report cannot be read, or the folder has changed since.
    """
    check_code(folder)
    report = None if report_file is None else read_report(report_file)
    with changing(folder) as partial:
        audited = None if audit_file is None else audit_of(audit_file, folder)
        for found in (report, None if audited is None else audited[0]):
            if found is not None:
                check_fresh(found, folder, advance)
        card = render(facts_of_folder(folder), report, audited=audited)
        _put_card(folder, partial, card)
    return folder / CARD


def _put_card(folder: Path, partial: Path, card: str) -> None:
    (partial / CARD).write_text(card, encoding="utf-8")
    put_files(folder, Manifest.read(folder), {CARD: partial / CARD})


# --------------------------------------------------------------------------- push


def push_folder(
    folder: Path,
    repo: str,
    *,
    report_file: Path | None,
    unverified: bool,
    private: bool,
    dry_run: bool,
    advance: Advance,
) -> Upload:
    """Upload a verified folder to the hub, with a card that shows the evidence.

    Args:
        folder: what bakeout wrote.
        repo: hub id, `user/name`.
        report_file: of a verification of this folder that passed in full.
        unverified: upload without one; the card then says so.
        private: create the repository as a private one.
        dry_run: change and upload nothing.
        advance: called with the share of bytes hashed so far.

    Raises:
        ReportError: there is no such report, it did not pass in full, or it is stale.
        FolderError: a file is not what the manifest says.
        PushError: the hub refuses, or cannot be reached.
    """
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", repo, re.ASCII):
        raise PushError(f"{repo}: is no hub id; expected user/name")
    check_code(folder)
    with nullcontext() if dry_run else changing(folder) as partial:
        report = _admissible(folder, report_file, unverified, advance)
        passed = report is not None and (report.verdict, report.scope) == ("pass", "full")
        signed = (folder / SIGNATURE).is_file()  # then it goes as it is
        card = render(facts_of_folder(folder), report, unverified=not passed)
        upload = _plan(folder, repo, private, None if signed else card)
        if partial is not None:
            if not signed:
                _put_card(folder, partial, card)
            _send(folder, upload)
    return upload


def _admissible(
    folder: Path, report_file: Path | None, unverified: bool, advance: Advance
) -> VerifyReport | None:
    """The report that allows a folder to be uploaded; None where that is forgone."""
    if report_file is None:
        if not unverified:
            raise ReportError(
                f"{folder}: no report; expected --report with what `bakeout verify FOLDER --json "
                "FILE` wrote, or --unverified, which the card then says"
            )
        broken = check_integrity(folder, Manifest.read(folder), advance)
        if broken:
            raise FolderError(
                f"{folder}: {broken[0].what}; what is not as its manifest says is never uploaded"
            )
        return None
    report = read_report(report_file)
    check_fresh(report, folder, advance)
    if unverified:
        return report
    if report.verdict != "pass":
        raise ReportError(
            f"report {report_file}: its verdict is fail ({report.failures[0]}); expected pass, or "
            "--unverified, which the card then says"
        )
    if report.scope != "full":
        raise ReportError(
            f"report {report_file}: its scope is {report.scope}; expected full, from `bakeout "
            "verify FOLDER --recipe RECIPE --json FILE`, or --unverified, which the card then says"
        )
    return report


def _plan(folder: Path, repo: str, private: bool, card: str | None) -> Upload:
    """What is sent: with a new card, or signed as it is."""
    names = sorted(Manifest.read(folder).files.keys() - {CARD})
    sizes = [(name, (folder / name).stat().st_size) for name in [CARD, *names, MANIFEST]]
    if card is not None:
        return Upload(repo, private, ((CARD, len(card.encode())), *sizes[1:]))
    signature = (SIGNATURE, (folder / SIGNATURE).stat().st_size)
    return Upload(repo, private, (*sizes[:-1], signature, sizes[-1]))


def _send(folder: Path, upload: Upload) -> None:
    """Create the repository where it is not there, and upload in one commit."""
    manifest = Manifest.read(folder)
    files = [_content(folder, manifest, name) for name, _ in upload.files]
    try:
        api = HfApi(library_name="bakeout")
        api.create_repo(upload.repo, private=upload.private, exist_ok=True, repo_type="model")
        api.create_commit(
            repo_id=upload.repo,
            operations=files,
            repo_type="model",
            commit_message="Upload a clamped model with its evidence",
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PushError(
            f"{upload.repo}: the upload failed ({type(error).__name__}: {first}); check the "
            "network, `hf auth whoami`, and that the token may write there; then push again"
        ) from error


def _content(folder: Path, manifest: Manifest, name: str) -> CommitOperationAdd:
    """A file as it is uploaded: what the manifest lists, though another may take its place now.
    Large ones are read again; the hub takes them only with the hash that they have here.

    Raises:
        FolderError: it is not what the manifest lists.
    """
    if name == MANIFEST:
        with open_in(folder, name) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise FolderError(f"{folder / name}: has changed meanwhile; push again")
        return CommitOperationAdd(name, data)
    if name == SIGNATURE:
        return CommitOperationAdd(name, read_in(folder, name))
    if not is_heavy(name):
        return CommitOperationAdd(name, read_listed(folder, manifest, name))
    found = CommitOperationAdd(name, file_in(folder, name))
    if found.upload_info.sha256.hex() != manifest.files[name]:
        raise FolderError(f"{folder / name}: is not the file that the manifest lists; {AGAIN}")
    return found


def card(
    folder: FolderPath,
    report: Annotated[
        Path | None,
        typer.Option(help="What `bakeout verify FOLDER --json FILE` wrote.", show_default=False),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(help="What `bakeout audit FOLDER --json FILE` wrote.", show_default=False),
    ] = None,
    bom: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what the folder was made from as CycloneDX instead; the folder stays.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the folder's README.md anew: what was removed, what was measured, what remains."""
    if bom is not None:
        check_code(folder)
        write_whole(bom, bom_of(folder), option="--bom")
        typer.echo(f"written to {bom}")
        return
    with progress("card") as advance:
        written = card_folder(folder, report, lambda share: advance("hash", share), audit)
    typer.echo(f"written to {written}")


def push(
    folder: FolderPath,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id: user/name.")],
    report: Annotated[
        Path | None,
        typer.Option(
            help="What `bakeout verify FOLDER --json FILE` wrote: pass, and in full.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create it as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded; change nothing.")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Without a passing report; the card says so.")
    ] = False,
) -> None:
    """Upload a folder that passed its verification to the hub, with a card that shows it."""
    with progress("push") as advance:
        upload = push_folder(
            folder,
            repo,
            report_file=report,
            unverified=unverified,
            private=private,
            dry_run=dry_run,
            advance=lambda share: advance("hash", share),
        )
    for name, size in upload.files:
        typer.echo(printable(f"{size / 1e6:>12,.3f} MB  {name}"))
    kind = "private" if upload.private else "public"
    total = f"{len(upload.files)} files, {upload.size / 1e6:,.1f} MB, {kind}: {upload.repo}"
    typer.echo(f"would upload {total}\nnothing sent (--dry-run)" if dry_run else f"sent {total}")


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
