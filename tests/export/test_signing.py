"""Signed folders: by key, by certificate; whose signature holds, and which does not."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import CommitOperationAdd
from model_signing import verifying

from bake.files.folder_files import SIGNATURE
from bakeout.cli import run
from export.manifest import Manifest
from tests.defects import rewrite_file
from tests.folders import baked_world

LONG = datetime.timedelta(days=3650)
BEGAN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


def new_key(folder: Path, name: str) -> ec.EllipticCurvePrivateKey:
    """A key pair, as `name.pem` and `name.pub`."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def new_certificate(
    path: Path,
    of: ec.EllipticCurvePrivateKey,
    name: str,
    by: ec.EllipticCurvePrivateKey,
    issuer: str,
) -> None:
    """A certificate of one key by another."""
    root = of is by

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    usage["key_cert_sign" if root else "digital_signature"] = True
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(of.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGAN)
        .not_valid_after(BEGAN + LONG)
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(by, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours` and `theirs`, keys; `root` and `other`, certificates; `leaf`, one of ours."""
    folder = tmp_path_factory.mktemp("keys")
    ours, theirs = (new_key(folder, name) for name in ("ours", "theirs"))
    root = new_key(folder, "root")
    new_certificate(folder / "root.crt", root, "Safety team", root, "Safety team")
    new_certificate(folder / "other.crt", theirs, "Others", theirs, "Others")
    new_certificate(folder / "leaf.crt", ours, "Ann", root, "Safety team")
    return folder


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("work"), [1, 5]) / "checkpoint"


@pytest.fixture
def folder(baked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(baked, tmp_path / "folder"))


def verified(folder: Path, signature: Path | str, report: Path) -> tuple[int, dict[str, object]]:
    """(exit code, report) of a verification of its files."""
    asked = ["--only", "integrity", "--signature", str(signature), "--json", str(report)]
    code = run(["verify", str(folder), *asked])
    return code, json.loads(report.read_text())


def test_a_key_signs_every_file(folder: Path, keys: Path, tmp_path: Path) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    code, report = verified(folder, keys / "ours.pub", tmp_path / "report.json")
    assert code == 0 and str(report["signed_by"]).startswith("key ")
    # Anybody's tools take it, and it is no file of the manifest.
    verifying.Config().use_elliptic_key_verifier(public_key=keys / "ours.pub").verify(
        folder, folder / SIGNATURE
    )
    assert SIGNATURE not in Manifest.read(folder).files
    assert run(["verify", str(folder), "--only", "integrity"]) == 0
    # The page and the card of that report say so.
    report_file = str(tmp_path / "report.json")
    assert run(["card", str(folder), "--report", report_file]) == 0
    assert str(report["signed_by"]) in (folder / "README.md").read_text()
    # A card is a file: what was signed is not what is there.
    code, report = verified(folder, keys / "ours.pub", tmp_path / "report.json")
    assert code == 1 and report["signed_by"] is None


def test_it_holds_in_the_hubs_cache_and_links_are_looked_at_first(
    folder: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # the hub adds one
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0f" * 20)
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    code, report = verified(snapshot, keys / "ours.pub", tmp_path / "report.json")
    assert code == 0 and str(report["signed_by"]).startswith("key ")
    capsys.readouterr()
    (folder / "endless").symlink_to("/dev/zero")
    asked = ["--only", "witnesses", "--signature", str(keys / "ours.pub")]
    assert run(["verify", str(folder), *asked]) == 2
    assert "endless: is a link" in capsys.readouterr().err


@pytest.mark.parametrize("trust", ["theirs.pub", "root.crt"])
def test_somebody_elses_signature_fails(
    trust: str, folder: Path, keys: Path, tmp_path: Path
) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    code, report = verified(folder, keys / trust, tmp_path / "report.json")
    assert code == 1 and report["verdict"] == "fail" and report["signed_by"] is None


def test_an_identity_is_asked_of_sigstore(
    folder: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    asked: dict[str, str] = {}

    def away(_: verifying.Config, **who: str) -> None:
        asked.update(who)
        raise OSError("no network")

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", away)
    trust = "ann@example.org,https://accounts.example.org"
    assert run(["verify", str(folder), "--only", "integrity", "--signature", trust]) == 2
    said = capsys.readouterr().err
    assert "no network" in said and said.count("\n") == 1
    assert asked == {"identity": "ann@example.org", "oidc_issuer": "https://accounts.example.org"}


@pytest.mark.parametrize("name", ["config.json", "README.md", "manifest.json"])
def test_what_was_changed_and_hashed_again_fails(
    name: str, folder: Path, keys: Path, tmp_path: Path
) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    if name == "manifest.json":
        (folder / name).write_text((folder / name).read_text() + "\n")
    else:
        rewrite_file(folder, name, (folder / name).read_bytes() + b"\n")
    assert run(["verify", str(folder), "--only", "integrity"]) == 0
    code, report = verified(folder, keys / "ours.pub", tmp_path / "report.json")
    assert code == 1
    (failure,) = report["failures"]  # type: ignore[misc]
    assert SIGNATURE in failure["what"] and name in failure["what"]


def test_a_folder_that_is_not_signed_fails(folder: Path, keys: Path, tmp_path: Path) -> None:
    code, report = verified(folder, keys / "ours.pub", tmp_path / "report.json")
    assert code == 1 and "is missing" in str(report["failures"])
    (folder / SIGNATURE).write_text("{}")
    code, report = verified(folder, keys / "ours.pub", tmp_path / "report.json")
    assert code == 1 and "cannot be read" in str(report["failures"])


def test_a_certificate_names_the_signer(folder: Path, keys: Path, tmp_path: Path) -> None:
    signer = ["--key", str(keys / "ours.pem"), "--certificate", str(keys / "leaf.crt")]
    assert run(["sign", str(folder), *signer]) == 0
    code, report = verified(folder, keys / "root.crt", tmp_path / "report.json")
    assert (code, report["signed_by"]) == (0, "CN=Ann")
    code, report = verified(folder, keys / "other.crt", tmp_path / "report.json")
    assert code == 1


def test_a_signed_folder_is_pushed_as_it_is(
    folder: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    sent: list[str] = []

    class Hub:
        def __init__(self, **_: object) -> None:
            pass

        def create_repo(self, *_: object, **__: object) -> None:
            pass

        def create_commit(self, *, operations: list[CommitOperationAdd], **_: object) -> None:
            sent.extend(of.path_in_repo for of in operations)

    monkeypatch.setattr("bakeout.verbs.publishing.HfApi", Hub)
    assert run(["push", str(folder), "team/model", "--unverified"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert set(sent) == before.keys() and sent[-1] == "manifest.json"


def test_only_a_whole_folder_is_signed(
    folder: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_bytes(b"{}")
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 2
    assert "never signed" in capsys.readouterr().err
    assert not (folder / SIGNATURE).exists()


@pytest.mark.parametrize("bad", ["no such", "empty", "text", "public"])
def test_bad_keys_are_one_line(
    bad: str, folder: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key.pem"
    if bad != "no such":
        text = {"empty": "", "text": "hello", "public": (keys / "ours.pub").read_text()}[bad]
        path.write_text(text)
    assert run(["sign", str(folder), "--key", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "expected" in said
    if bad != "public":
        assert run(["verify", str(folder), "--signature", str(path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "expected" in said


def test_without_the_library_it_says_what_to_install(
    folder: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert run(["sign", str(folder), "--key", str(keys / "ours.pem")]) == 2
    assert "bakeout[sign]" in capsys.readouterr().err
