"""A study that machines share: each point once, whoever dies; and no password anywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import bake.search.sweep
from bake.errors import OutputError, ScaleError
from bake.recipe import Recipe
from bake.scale.storage import SharedStore
from bake.search.study import STORED, Study, check_folder
from bake.search.sweep import run_sweep
from bakeout.cli import run
from bakeout.pages.sweep_view import sweep_dict
from tests.bake.scale.postgres import PASSWORD, QUOTED, Server, running_server
from tests.bake.studied import POINTS, measure_all
from tests.bake.swept import AXES, GRID, without_times

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


def trials(server: Server, name: str) -> list[optuna.trial.FrozenTrial]:
    url = server.url.replace("postgresql", "postgresql+psycopg")
    return optuna.load_study(study_name=name, storage=url).trials


def test_two_processes_that_begin_at_once_measure_each_point_once(
    server: Server, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [  # each a machine of its own, with its own folder
        context.Process(target=measure_all, args=(log, tmp_path / f"{n}" / "at once", server.url))
        for n in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(map(float, log.read_text().split())) == [-float(i) for i in reversed(range(12))]
    assert all(trial.state.name == "COMPLETE" for trial in trials(server, "at once"))


KILLED = """
import sys, time
from pathlib import Path
from bake.search.study import Study
study = Study(Path(sys.argv[1]), "same", sys.argv[2])
study.claim()
print("there", flush=True)
time.sleep(60)
"""


def test_a_killed_process_and_a_server_that_starts_anew_lose_nothing(
    server: Server, tmp_path: Path
) -> None:
    study = Study(tmp_path / "killed", "same", server.url)
    study.add(POINTS[:3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "there" / "killed"), server.url],
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    mine = [study.claim(), study.claim()]
    assert study.claim() is None and study.left() == 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while (again := study.claim()) is None:  # until the server has seen it
        pass
    assert dict(again[1].settings)["value"] == -0.0
    server.stop()
    with pytest.raises(ScaleError, match=r"cannot be used \(.*refused\); expected a PostgreSQL"):
        study.left()
    server.start()
    for claimed in (*mine, again):
        assert claimed is not None
        study.tell(claimed[0], 0.5, 0.5, {})
    assert study.left() == 0 and len(study.finished()) == 3
    study.close()


def test_a_point_that_passed_to_others_is_theirs(server: Server, tmp_path: Path) -> None:
    study, other = (Study(tmp_path / n / "passed", "same", server.url) for n in "ab")
    study.add(POINTS[:1])
    claimed = study.claim()
    study.close()  # as when its machine is cut off
    taken = other.claim()
    assert claimed is not None and taken is not None
    other.tell(taken[0], 0.25, 0.5, {})
    study.tell(claimed[0], 0.75, 0.75, {})
    assert [found.forget for found in other.finished()] == [0.25]
    study.close()
    other.close()


def test_machines_that_share_a_sweep_report_what_one_does(
    swept_recipe: Path,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["sweep", str(swept_recipe), *GRID]
    assert run([*command, "--out", str(tmp_path / "alone")]) == 0
    shown = [capsys.readouterr().out]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    shared, outs = [*command, "--storage", server.url], [tmp_path / n / "shared" for n in "ab"]
    with subprocess.Popen(
        [sys.executable, "-m", "bakeout", *shared, "--out", str(outs[0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert run([*shared, "--out", str(outs[1])]) == 0
        captured = capsys.readouterr()
        out, err = process.communicate()
        assert (process.returncode, err, captured.err) == (0, "", "")
    shown += [captured.out, out]
    tables = [text.rpartition("\n\n")[0] for text in shown]  # but for where files were written
    assert "Pareto front" in tables[0] and tables[0] == tables[1] == tables[2]
    reports = [json.loads((at / "report.json").read_text()) for at in (tmp_path / "alone", *outs)]
    assert (
        reports[1] == reports[2]
        and [t.state.name for t in trials(server, "shared")] == ["COMPLETE"] * 8
    )
    assert without_times(reports[0]) == without_times(reports[1])

    def refused(arguments: list[str], said: str) -> None:
        assert run(arguments) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and said in line, line
        assert PASSWORD not in line and QUOTED not in line

    at = ["--out", str(outs[0])]
    refused([*shared, *at, "--grid", "trigger=0,1"], "of another recipe, model, data or grid")
    refused([*command, *at], "holds a sweep whose study lies in a storage; name it, or")
    refused([*shared, "--out", str(tmp_path / "alone")], "lies here; leave --storage out, or")
    text = swept_recipe.read_text()
    swept_recipe.write_text(text.replace("retain_threshold = 0.3", "retain_threshold = 0.4"))
    refused([*shared, *at], "of another recipe, model, data or grid")
    swept_recipe.write_text(text)
    old = {"bakeout": "9.9.9", "torch": "1", "transformers": "1"}
    with monkeypatch.context() as patch:
        patch.setattr("bake.search.study.about_here", lambda: old)
        refused([*shared, *at], "was begun with bakeout ")
    wrong = [*command, *at, "--storage", server.url.replace("%40", "%41")]
    refused(wrong, 'password authentication failed for user "sweeper"')
    for path in tmp_path.rglob("*"):  # nor is a password kept in any file
        if path.is_file():
            data = path.read_bytes()
            assert PASSWORD.encode() not in data and QUOTED.encode() not in data, path


def test_who_waits_for_others_does_what_they_leave(
    swept_recipe: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(swept_recipe)
    single = run_sweep(recipe, AXES, tmp_path / "single")
    made: list[tuple[Any, ...]] = []
    others: list[Study] = []

    class Seen(Study):
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(bake.search.sweep, "Study", Seen)

    def told(what: str, share: float) -> None:
        if made and not others:  # another machine takes a point,
            others.append(Study(tmp_path / "other" / "waits", *made[0][1:]))
            assert others[0].claim() is not None
        if what == "others measure the last points":  # and is lost when only that is left
            others[0].close()

    found = run_sweep(recipe, AXES, tmp_path / "waits", storage=server.url, progress=told)
    assert others and single is not None and found is not None
    assert sum(trial.state.name == "FAIL" for trial in trials(server, "waits")) == 1
    assert without_times(sweep_dict(single)) == without_times(sweep_dict(found))


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("postgresql://u:secret@127.0.0.1:1/x", "/x, study s: cannot be used (connection failed"),
        ("postgresql://u:secret@127.0.0.1:99999999/x?password=secret", "/x, study s: cannot be"),
        ("mysql://u:secret@host/x", "--storage mysql://…: is of no known kind; expected postgre"),
        ("sqlite:///secret", "--storage sqlite://…: is of no known kind"),
        ("postgresql://u:secret", "--storage: is no URL; expected postgresql://USER@HOST:PORT/"),
        ("postgresql://u:a@secret@host/x", "with %40 for an @ in user or password"),
        ("postgresql://u/u:secret@host/x", "--storage: is no URL"),
        ("secret", "--storage: is no URL"),
        ("", "--storage: is no URL"),
    ],
)
def test_storages_that_cannot_be_used(tmp_path: Path, storage: str, said: str) -> None:
    with pytest.raises(ScaleError) as error:  # before anything is counted
        check_folder(tmp_path / "s", storage)
    assert said in str(error.value) and "secret" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["y" * 600, "a\udcffb", "a\nb"])
def test_a_name_that_is_too_long_or_cannot_be_shown(name: str) -> None:
    with pytest.raises(OutputError, match="expected at most 512 characters that can be shown"):
        Study(Path("/", "x" * 200, name), "same", "postgresql://host/x")


@pytest.mark.parametrize("directions", [["minimize"], ["minimize", "maximize"]])
def test_a_study_of_something_else_stays_as_it_is(
    server: Server, tmp_path: Path, directions: list[str]
) -> None:
    name = f"foreign{len(directions)}"
    store = SharedStore(server.url, name)
    with store.locked():
        foreign = optuna.create_study(storage=store.open(), study_name=name, directions=directions)
        foreign.enqueue_trial({"x": 1})
    with pytest.raises(OutputError, match="holds a study of something else"):
        Study(tmp_path / name, "same", server.url)
    assert foreign.user_attrs == {} and len(foreign.get_trials()) == 1
    store.close()


def test_a_folder_goes_with_its_storage(server: Server, tmp_path: Path) -> None:
    Study(tmp_path / "there", "same", server.url).close()
    check_folder(tmp_path / "there", server.url)
    (tmp_path / "there" / STORED).write_text("--storage postgresql://elsewhere/x, study there\n")
    with pytest.raises(OutputError, match=r"lies elsewhere \(--storage postgresql://elsewhere"):
        check_folder(tmp_path / "there", server.url)


def test_without_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ScaleError, match=r"psycopg is not here; pip install 'bakeout\[scale\]'"):
        Study(tmp_path / "s", "same", "postgresql://host/x")
