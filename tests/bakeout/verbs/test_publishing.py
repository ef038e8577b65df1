"""`bakeout card` and `bakeout push` on a tiny folder, with a stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, ModelCard

import bakeout.verbs.publishing as publishing
from bake.recipe import Recipe
from bakeout.cli import run
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.manifest import Manifest
from model_cards.render import render_card
from tests.reports import FAILURE, error_line, full_report
from tests.worlds import save_sae_lens, tiny_base, tiny_sae
from verify.evidence.integrity import check_integrity
from verify.report.findings import VerifyReport


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A baked checkpoint with its card."""
    import tomli_w

    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    questions = {"path": "q.jsonl"}
    data = {
        "schema": 1,
        "base": {"model": "base", "license": "apache-2.0"},
        "clamp": [{"sae": {"path": "sae"}, "method": "clamp", "features": [9, 2], "value": -6.0}],
        "verify": {
            "forget_questions": questions,
            "retain_questions": questions,
            "text": {"path": "t.jsonl"},
        },
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data))
    plan = plan_checkpoint(Recipe.load(tmp_path / "recipe.toml"))
    card = render_card(plan.recipe, plan.base, plan.clamps)
    return write_checkpoint(plan, tmp_path / "out", card=card)


def save(folder: Path, report: VerifyReport | None = None, **changes: Any) -> Path:
    """A report of the folder as it is, beside it."""
    manifest = Manifest.read(folder)
    report = replace(
        report or full_report(),
        manifest_sha256=manifest.sha256,
        card_sha256=manifest.files["README.md"],
        **changes,
    )
    file = folder.with_name("report.json")
    file.write_text(json.dumps(report.to_dict()))
    return file


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- card


def test_a_card_at_bake_says_not_measured_yet(folder: Path) -> None:
    assert "Matches the hooked reference: not measured yet." in card(folder)


def test_a_card_takes_the_figures_and_leaves_the_folder_sound(folder: Path) -> None:
    before = contents(folder)
    report = save(folder)
    assert run(["card", str(folder), "--report", str(report)]) == 0
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "README.md",
        "manifest.json",
    }
    assert after.keys() == before.keys()
    assert check_integrity(folder, Manifest.read(folder)) == ()
    assert "0.500 (0.15 to 0.85)" in card(folder) and "not measured yet" not in card(folder)
    assert ModelCard(card(folder)).data.eval_results is not None
    assert sorted(path.name for path in folder.parent.glob(".*")) == []
    # The report is of this folder still: the card alone has changed. And again gives the same.
    assert run(["card", str(folder), "--report", str(report)]) == 0
    assert contents(folder) == after


def test_a_card_without_a_report_says_not_measured(folder: Path) -> None:
    run(["card", str(folder), "--report", str(save(folder))])
    assert run(["card", str(folder)]) == 0
    assert "Matches the hooked reference: not measured." in card(folder)
    assert check_integrity(folder, Manifest.read(folder)) == ()


def change_a_file(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def add_a_listed_file(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"graph")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = hashlib.sha256(b"graph").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def newer_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 9}))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (change_a_file, "stale: the folder has changed since: config.json: changed"),
        (add_a_listed_file, "is stale: it was made of a manifest.json with sha256"),
        (newer_manifest, '"schema" is 9, and this bakeout knows up to 1'),
    ],
)
@pytest.mark.parametrize("verb", [["card"], ["push"]], ids=lambda verb: str(verb[0]))
def test_a_folder_that_changed_since_is_refused(
    verb: list[str],
    spoil: Callable[[Path], None],
    match: str,
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = save(folder)
    spoil(folder)
    before = contents(folder)
    capsys.readouterr()
    repo = ["me/model"] if verb == ["push"] else []
    assert run([*verb, str(folder), *repo, "--report", str(report)]) == 2
    assert match in error_line(capsys)
    assert contents(folder) == before and hub.calls == []


def test_card_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["card", str(tmp_path)]) == 2
    assert "has no manifest.json" in error_line(capsys)
    (tmp_path / "r.json").write_text('{"schema": 2}')
    assert run(["card", str(tmp_path), "--report", str(tmp_path / "r.json")]) == 2
    assert "schema is 2, and this bakeout knows up to 1" in error_line(capsys)


def test_a_folder_that_cannot_be_written_stays_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr("export.manifest.Manifest.write", full)
    capsys.readouterr()
    assert run(["card", str(folder)]) == 2
    assert "the disk is full" in error_line(capsys)
    assert contents(folder) == before and list(folder.parent.glob(".*")) == []


# --------------------------------------------------------------------------- push


@dataclass
class Hub:
    """Stands in for `HfApi`; takes what `create_commit` would take."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uploaded: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_commit(self, *, operations: list[CommitOperationAdd], **options: Any) -> None:
        self.calls.append(("create_commit", options))
        self.uploaded = {
            operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("bakeout.verbs.publishing.HfApi", lambda **_: hub)
    return hub


def push(folder: Path, *options: str) -> int:
    return run(["push", str(folder), "me/model", *options])


def test_a_verified_folder_goes_up_whole_with_its_figures(folder: Path, hub: Hub) -> None:
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "left.lock").write_text("")
    assert push(folder, "--report", str(save(folder)), "--private") == 0
    assert hub.calls[0] == (
        "create_repo",
        {"repo_id": "me/model", "private": True, "exist_ok": True, "repo_type": "model"},
    )
    assert hub.calls[1][1]["repo_id"] == "me/model"
    manifest = Manifest.read(folder)
    assert hub.uploaded.pop("manifest.json") == manifest.sha256
    assert hub.uploaded == manifest.files
    assert "bakeout verify`: **pass**, scope full" in card(folder)
    assert "Unverified" not in card(folder)


def test_a_dry_run_says_what_would_go_and_changes_nothing(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert push(folder, "--report", str(save(folder)), "--dry-run") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in before)
    assert "would upload" in said and "me/model" in said and "nothing sent" in said
    assert contents(folder) == before and hub.calls == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"failures": (FAILURE,)}, "its verdict is fail (parity: checkpoint: max_abs_logit"),
        ({"scope": "integrity"}, "its scope is integrity; expected full"),
    ],
)
def test_what_did_not_pass_in_full_stays_unless_asked_for(
    changes: dict[str, Any],
    match: str,
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = save(folder, **changes)
    capsys.readouterr()
    assert push(folder, "--report", str(report)) == 2
    assert match in error_line(capsys)
    assert hub.calls == []
    assert push(folder, "--report", str(report), "--unverified") == 0
    assert "Unverified" in card(folder) and hub.uploaded


def test_without_a_report_only_unverified(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert push(folder) == 2
    assert "expected --report" in error_line(capsys)
    assert push(folder, "--unverified") == 0
    assert "**Unverified.**" in card(folder) and "not measured" in card(folder)
    assert hub.uploaded["README.md"] == Manifest.read(folder).files["README.md"]
    change_a_file(folder)
    capsys.readouterr()
    assert push(folder, "--unverified") == 2
    assert "config.json: changed; what is not as its manifest says" in error_line(capsys)


@pytest.mark.parametrize("repo", ["a/b/c", "", "../x", "me/ model", "https://x"])
def test_what_is_no_hub_id(
    repo: str, folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["push", str(folder), repo, "--unverified"]) == 2
    assert "is no hub id; expected user/name" in error_line(capsys)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("no route\nto host"), ConnectionError("offline"), ValueError("no token")],
)
def test_a_hub_that_refuses_is_one_line(
    error: Exception, folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    capsys.readouterr()
    assert push(folder, "--unverified") == 2
    assert "me/model: the upload failed" in error_line(capsys)


@pytest.mark.parametrize("name", ["recipe.toml", "model-sae-clamp.safetensors", "manifest.json"])
def test_what_changes_after_it_was_checked_is_not_sent(
    name: str,
    folder: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder.parent / "key").write_text("PRIVATE KEY")
    read = publishing.Manifest.read

    def swap(root: Path) -> Any:
        found = read(root)
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent / "key")
        return found

    put = publishing._put_card

    def put_and_swap(*given: Any) -> None:
        put(*given)
        monkeypatch.setattr(publishing.Manifest, "read", swap)

    monkeypatch.setattr(publishing, "_put_card", put_and_swap)
    capsys.readouterr()
    assert push(folder, "--unverified") == 2
    assert name in error_line(capsys) and hub.calls == []
    assert "PRIVATE" not in str(hub.uploaded)
