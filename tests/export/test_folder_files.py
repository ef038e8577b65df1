"""Names, links and pipes in strangers' folders: whatever the verb, nothing outside is read or
written, and what is neither listed nor of bakeout is refused.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import bake.files.folder_files as folder_files
import bakeout.verbs.publishing as publishing
import export.folder_contents as folder_contents
from bake.errors import FolderError
from bake.files.folder_files import file_in, open_in, sha256_in, wrong_name
from bake.new_folder import MANIFEST
from bakeout.cli import run
from bakeout.verbs.exporting import export_adapter, export_compiled
from export.carriers.carriers import CARRIERS
from export.folder_contents import copy_listed, odd_contents, read_listed, recipe_in
from export.manifest import Manifest
from tests.folders import rehash
from tests.worlds import talkative
from verify.evidence.integrity import check_integrity
from verify.run import verify_folder

CANARY = b"CANARY: what lies outside the folder\n"
INDEX, GRAPH, ROUNDED = "model.safetensors.index.json", "model.onnx", "onnx/model_q4.onnx"
SHARD, CLAMP = "model-00001-of-00001.safetensors", "model-sae-clamp.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` with a shared and a rounded graph; `compiled`, `adapter`; `rounded` alone."""
    root = tmp_path_factory.mktemp("world")
    folder = root / "checkpoint"
    assert run(["bake", str(talkative(root)), "--out", str(folder), "--witnesses"]) == 0
    for options in ([], ["--precision", "int4"]):
        assert run(["export", "onnx", str(folder), *options]) == 0
    rounded = ["--precision", "int4", "--out", str(root / "rounded")]
    assert run(["export", "onnx", str(folder), *rounded]) == 0
    export_compiled(folder, root / "compiled")
    export_adapter(folder, root / "adapter")
    return root


# --------------------------------------------------------------------------- the ways out


def listed(name: str) -> Callable[[Path, Path], None]:
    """A manifest that lists a name."""

    def plant(folder: Path, outside: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name.replace("OUT", str(outside))] = "0" * 64
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return plant


def link(name: str, target: str = "canary") -> Callable[[Path, Path], None]:
    """A file, or folder, that is a link outside, with the hash of what it leads to."""

    def plant(folder: Path, outside: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(outside / target)
        if name != MANIFEST:
            rehash(folder, *([name] if path.is_file() else []))

    return plant


def moved(name: str) -> Callable[[Path, Path], None]:
    """A file of the folder that lies outside now, and a link to it."""

    def plant(folder: Path, outside: Path) -> None:
        shutil.move(folder / name, outside / "moved")
        (folder / name).symlink_to(outside / "moved")

    return plant


def linked_folder(folder: Path, outside: Path) -> None:
    """The whole sub-folder lies outside."""
    shutil.move(folder / "onnx", outside / "onnx")
    (folder / "onnx").symlink_to(outside / "onnx")


def through_a_link(folder: Path, outside: Path) -> None:
    """`q/../canary`, where q is a link: as text it is inside, for the system it is not."""
    (outside / "deep").mkdir()
    (folder / "q").symlink_to(outside / "deep")
    listed("q/../canary")(folder, outside)


def pipe(name: str) -> Callable[[Path, Path], None]:
    """A pipe that nobody writes: whoever opens it waits."""

    def plant(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return plant


def index(shard: str) -> Callable[[Path, Path], None]:
    """An index that places the base's tensors elsewhere."""

    def plant(folder: Path, outside: Path) -> None:
        name = shard.replace("OUT", str(outside))
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / SHARD, place)
        found = json.loads((folder / INDEX).read_text())
        found["weight_map"] = {
            key: name if of == SHARD else of for key, of in found["weight_map"].items()
        }
        (folder / INDEX).write_text(json.dumps(found))
        rehash(folder)

    return plant


def graph(location: str, change: Callable[[onnx.ModelProto, str], None]) -> Callable[..., None]:
    """A graph that takes numbers from elsewhere."""

    def plant(folder: Path, outside: Path) -> None:
        model = onnx.load(folder / GRAPH, load_external_data=False)
        name = location.replace("OUT", str(outside))
        change(model, name)
        (folder / GRAPH).write_bytes(model.SerializeToString())
        if not name.startswith(("/", ".")) or name.startswith((".git", ".cache")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / SHARD, folder / name)
        rehash(folder)

    return plant


def in_initializer(model: onnx.ModelProto, location: str) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="t", data_type=TensorProto.UINT8, dims=[len(CANARY)])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_constant(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["t"], value=external(location)))


def in_function(model: onnx.ModelProto, location: str) -> None:
    body = model.functions[0].node
    body.append(helper.make_node("Constant", [], ["t"], value=external(location)))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    **{
        f"lists {name[:20]!a}": listed(name)
        for name in (
            *("../outside/canary", "OUT/canary", "a/../../outside/canary", "./config.json", "a//b"),
            *(
                "..\\outside\\canary",
                "C:canary",
                "a\0b",
                "a\nb",
                "a\u202eb",
                "n" * 256,
                "",
                "..",
                "a/",
            ),
            *("/etc/hostname", "\udc80"),
        )
    },
    "lists through a link": through_a_link,
    **{
        f"{name} is a link": link(name)
        for name in (
            *("LICENSE", "NOTICE", "tokenizer.json", "chat_template.jinja", "README.md"),
            *("config.json", "generation_config.json", "recipe.toml", "witnesses.npz", INDEX),
            *("genai_config.json", GRAPH, ROUNDED, MANIFEST, SHARD, CLAMP),
            *("additional_chat_templates/a.jinja", "modeling_clamped_gemma.py"),
        )
    },
    **{
        f"{name} lies outside": moved(name)
        for name in (SHARD, CLAMP, GRAPH, f"{ROUNDED}_data", "config.json", MANIFEST)
    },
    "onnx lies outside": linked_folder,
    "templates are a link": link("additional_chat_templates", "."),
    "onnx is a link": link("onnx", "."),
    "git is a link": link(".git", "."),
    **{
        f"{name} is a pipe": pipe(name)
        for name in ("LICENSE", "config.json", MANIFEST, "witnesses.npz", SHARD, "x")
    },
    **{
        f"index into {shard}": index(shard)
        for shard in (
            *(".cache/huggingface/w.safetensors", ".git/w.safetensors", "onnx/w.safetensors"),
            *("../outside/w.safetensors", "OUT/w.safetensors", "w.safetensors"),
            *("model.safetensors", "tokenizer.model"),
        )
    },
}
GRAPH_WAYS = {
    **{
        f"into {name}": graph(name, in_initializer)
        for name in (
            *("../outside/canary", "OUT/canary", ".cache/huggingface/w", ".git/w", "unlisted"),
            f"./{SHARD}",
        )
    },
    "a constant outside": graph("OUT/canary", in_constant),
    "a constant of a body outside": graph("../outside/canary", in_function),
}

VERBS = (
    *(["verify", "F", "--only", "integrity"], ["verify", "F", "--only", "witnesses"]),
    *(
        ["export", "onnx", "F", "--force"],
        ["export", "onnx", "F", "--precision", "int4", "--force"],
    ),
    ["export", "onnx", "F", "--precision", "int4", "--out", "made"],
    *(["export", "compiled", "F", "--out", "made"], ["export", "adapter", "F", "--out", "made"]),
    *(["card", "F"], ["push", "F", "user/name", "--unverified"], ["chat", "F"]),
)


@pytest.fixture
def attacked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path, Path], None]], dict[str, Any]]:
    """Plants a way out into a copy, `F`, of the checkpoint; returns all that is there then."""

    def plant(way: Callable[[Path, Path], None]) -> dict[str, Any]:
        (outside := tmp_path / "outside").mkdir()
        (outside / "canary").write_bytes(CANARY)
        way(shutil.copytree(world / "checkpoint", tmp_path / "F"), outside)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(publishing, "HfApi", lambda **_: pytest.fail("something was sent"))
        monkeypatch.setattr("sys.stdin", io.StringIO())
        return seen(tmp_path)

    return plant


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_outside_is_read_or_written_by_any_verb(
    attacked: Any, tmp_path: Path, way: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = attacked(way)
    for verb in VERBS:
        refused(verb, capsys)
    assert seen(tmp_path) == before


@pytest.mark.parametrize("way", GRAPH_WAYS.values(), ids=GRAPH_WAYS)
def test_a_graph_that_takes_numbers_from_elsewhere_is_not_run(
    attacked: Any, tmp_path: Path, way: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = attacked(way)
    for verb in (*VERBS[:2], ["chat", "F", "--engine", "onnx"]):
        refused(verb, capsys)
    assert seen(tmp_path) == before
    for verb in VERBS[4:7]:  # they take nothing from the graph
        assert run(verb) in (0, 2)
        after = seen(tmp_path)
        made = {name for name in after if name.split("/")[0] == "made"}
        assert {name: after[name] for name in after if name not in made} == before
        assert not any(CANARY in bytes(after[name][1]) for name in made if after[name][1])
        shutil.rmtree("made", ignore_errors=True)


def refused(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that refuses in one line, or fails for integrity, and does not show the canary."""
    capsys.readouterr()
    code = run(list(verb))
    out, err = capsys.readouterr()
    line = code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert line or (code == 1 and verb[0] == "verify" and "integrity" in out), (verb, err)
    assert CANARY.decode().strip() not in out + err


def seen(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything below a folder: its kind, and its bytes or where it leads."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        holds: bytes | str = ""
        if path.is_symlink():
            holds = str(path.readlink())
        elif path.is_file():
            holds = path.read_bytes()
        found[str(path.relative_to(folder))] = mode, holds
    return found


@pytest.mark.parametrize("name", [INDEX, "recipe.toml"])
def test_no_more_is_read_than_a_file_of_its_kind_has(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = shutil.copytree(world / "checkpoint", tmp_path / "checkpoint")
    with (folder / name).open("wb") as file:
        file.truncate(1 << 26)
    manifest = Manifest.read(folder)
    read: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read.append(1 << 62 if size is None or size < 0 else size)
            return b"x" * min(read[-1], 1 << 26)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bake.reading.capped.open_in", lambda *_: Counted())
        if name == INDEX:
            assert any(odd == name for odd, _ in odd_contents(folder, manifest))
        else:
            with pytest.raises(FolderError, match=r"recipe\.toml: cannot be read \(has more than"):
                recipe_in(folder, manifest)
    assert read and max(read) <= (1 << 24) + 1
    assert run(["card", str(folder)]) == 2
    assert "error: " in capsys.readouterr().err


# --------------------------------------------------------------------------- races


def test_what_changes_between_hash_and_copy_is_not_copied(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "adapter", tmp_path / "adapter")
    manifest = Manifest.read(folder)
    assert check_integrity(folder, manifest) == ()
    (folder / "recipe.toml").write_bytes(CANARY)
    for use in (
        lambda: copy_listed(folder, manifest, "recipe.toml", tmp_path / "copy"),
        lambda: read_listed(folder, manifest, "recipe.toml"),
    ):
        with pytest.raises(FolderError, match=r"recipe\.toml: is not the file that the manifest"):
            use()
    assert not (tmp_path / "copy").exists()
    with pytest.raises(FolderError, match=r"does not list NOTICE"):
        copy_listed(folder, manifest, "NOTICE", tmp_path / "copy")


@pytest.mark.parametrize("place", ["file", "folder", "pipe"])
def test_a_link_that_takes_a_files_place_after_it_was_looked_at_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "a").write_bytes(CANARY)
    (folder := tmp_path / "folder" / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    looked = file_in

    def swap(root: Path, name: str) -> Path:
        found = looked(root, name)
        if place == "folder":
            shutil.rmtree(folder)
            folder.symlink_to(outside)
        else:
            (folder / "a").unlink()
            (folder / "a").symlink_to(outside / "a") if place == "file" else os.mkfifo(folder / "a")
        return found

    monkeypatch.setattr(folder_files, "file_in", swap)
    with pytest.raises(FolderError, match=r"is a link, which is|is no regular file"):
        open_in(folder.parent, "sub/a")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    failed: list[str] = []

    def look() -> None:
        try:
            sha256_in(tmp_path, "a")
        except FolderError as error:
            failed.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(30)
    assert len(failed) == 1 and "is no regular file" in failed[0]


def test_names() -> None:
    for name in ("a", "a/b.c", "a b", "Lizenz-ä.txt", "..a", "a..", "n" * 255, ".git/x"):
        assert wrong_name(name) is None, name
    for wrong in (
        None,
        3,
        "",
        "/a",
        "a/",
        "a//b",
        "./a",
        "a/.",
        "..",
        "a\\b",
        "a:b",
        "a\tb",
        "ä" * 128,
    ):
        assert wrong_name(wrong) is not None, wrong


# --------------------------------------------------------------------------- what may be there

STRANGE: dict[str, list[str]] = {
    "layer": [
        *("custom_generate/generate.py", "configuration_clamped.py", "tokenizer_more.py"),
        *("pytorch_model.bin", "model.safetensors", "adapter_config.json", "preprocessor.py"),
        *("adapter_model.safetensors", "more.safetensors", "onnx/model_q8.onnx", "model.onnx_data"),
        *("additional_chat_templates/a.py", "additional_chat_templates/b/a.jinja", "a.gguf"),
        *("onnx/genai_config.json", "LICENSE.py", "LICENSE.json", "notes.txt", "a/README.md"),
        *(
            "chat_template.py",
            ".gitattributes",
            ".git/config",
            ".cache/huggingface/x",
            ".gitignore",
        ),
        *("quantize_config.json", "tf_model.h5", "flax_model.msgpack", ".cache/huggingface/x"),
        ".bakeout-partial/x",
    ],
    "compiled": ["modeling_clamped_gemma.py", "model.safetensors", "custom_generate/generate.py"],
    "adapter": [
        *("config.json", "model.onnx", "witnesses.npz", "tokenizer.json", "adapter_model.bin"),
        *("modeling_clamped_gemma.py", "chat_template.jinja", INDEX, SHARD),
    ],
    "rounded": [SHARD, CLAMP, "adapter_config.json", "model.onnx_data"],
}
NAMES = {"layer": "checkpoint"}


@pytest.mark.parametrize("carrier", STRANGE)
def test_what_bakeout_does_not_write_is_refused_even_where_it_is_listed(
    world: Path, tmp_path: Path, carrier: str
) -> None:
    name = NAMES.get(carrier, carrier)
    for strange in STRANGE[carrier]:
        folder = tmp_path / "folder"
        shutil.copytree(world / name, folder, copy_function=os.link)
        manifest = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_bytes(manifest)
        (folder / strange).parent.mkdir(parents=True, exist_ok=True)
        (folder / strange).write_text("{}")
        rehash(folder, strange)
        said = {failure.what for failure in check_integrity(folder, Manifest.read(folder))}
        assert f"{strange}: bakeout writes no such file" in said, strange
        assert verify_folder(folder, only=frozenset({"integrity"})).exit_code == 1
        with pytest.raises(FolderError, match="expected what bakeout wrote and nothing else"):
            folder_contents.check_contents(folder, Manifest.read(folder))
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["checkpoint", "compiled", "adapter", "rounded"])
def test_what_a_base_a_user_or_a_transport_brings_is_allowed(
    world: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(world / name, tmp_path / "folder")
    licences = ["LICENSE", "LICENSE.txt", "LICENSE-GEMMA.md", "NOTICE", "NOTICE.txt", "LICENSE-2.0"]
    of_base = [
        *("tokenizer.model", "added_tokens.json", "chat_template.json", "processor_config.json"),
        *("preprocessor_config.json", "additional_chat_templates/tool_use.jinja", "merges.txt"),
        *("vocab.json", "special_tokens_map.json", "generation_config.json"),
    ]
    brought = [*licences, *(() if name == "adapter" else of_base)]
    for file in brought:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("{}")
    rehash(folder, *brought)
    for file in (".git/HEAD", ".cache/huggingface/download/x", ".bakeout-partial/x"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x")
    for file in (".gitattributes", ".bakeout-partial.onnx"):
        (folder / file).write_text("x")
    (folder / "empty" / "below").mkdir(parents=True)
    assert check_integrity(folder, Manifest.read(folder)) == ()


def test_of_a_carrier_that_is_not_known_only_names_and_links_are_looked_at(
    world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(world / "adapter", tmp_path / "folder")
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | {"carrier": "woven"}))
    (folder / "new.bin").write_text("x")
    rehash(folder, "new.bin")
    assert "woven" not in CARRIERS
    assert check_integrity(folder, Manifest.read(folder)) == ()
    (folder / "b").symlink_to("new.bin")
    assert [name for name, _ in odd_contents(folder, Manifest.read(folder))] == ["b"]
