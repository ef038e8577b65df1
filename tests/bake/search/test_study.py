"""A study that several processes share: each point once, whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bake.errors import OutputError
from bake.search.study import JOURNAL, Study
from tests.bake.studied import POINTS, measure_all


def test_two_processes_measure_each_point_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log, folder = tmp_path / "log", tmp_path / "study"
    workers = [context.Process(target=measure_all, args=(log, folder)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(map(float, log.read_text().split())) == [-float(i) for i in reversed(range(12))]
    study = Study(folder, "same")
    assert len(study.finished()) == 12 and study.left() == 0
    # Least forget accuracy, most retained: the squares fall as the values rise.
    assert [dict(point.point.settings)["value"] for point in study.front()] == [0.0]
    study.close()


def test_the_front_is_what_nothing_beats(tmp_path: Path) -> None:
    outcomes = [(0.3, 0.9), (0.5, 0.99), (0.4, 0.9), (0.2, 0.5), (0.2, 0.4)]
    study = Study(tmp_path / "study", "same")
    study.add(POINTS[: len(outcomes)])
    for forget, retain in outcomes:
        claimed = study.claim()
        assert claimed is not None
        study.tell(claimed[0], forget, retain, {})
    front = [(found.forget, found.retain) for found in study.front()]
    assert front == [(0.2, 0.5), (0.3, 0.9), (0.5, 0.99)]
    study.close()


KILLED = """
import sys, time
from pathlib import Path
from bake.search.study import Study
from tests.bake.studied import POINTS
study = Study(Path(sys.argv[1]), "same")
study.add(POINTS)
for _ in range(2):
    trial, point = study.claim()
    study.tell(trial, 0.5, 0.5, {})
study.claim()
print("there", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_its_point_to_others(tmp_path: Path) -> None:
    folder, log = tmp_path / "study", tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    alive = Study(folder, "same")
    assert alive.left() == len(POINTS) - 2
    alive.close()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with (folder / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')  # as a kill in the middle of a line leaves it
    measure_all(log, folder)
    assert len(log.read_text().split()) == len(POINTS) - 2
    study = Study(folder, "same")
    assert [found.point for found in study.finished()] == POINTS  # in their order
    study.close()


def test_a_study_grows_and_belongs_to_its_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study = Study(folder, "same")
    study.add(POINTS[:2])
    study.add(POINTS[:3])
    study.close()
    assert (
        sum(
            json.loads(line).get("op_code") == 4
            for line in (folder / JOURNAL).read_text().splitlines()
        )
        == 3
    )
    with pytest.raises(OutputError, match="holds a sweep of another recipe"):
        Study(folder, "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and holds no sweep"):
        Study(tmp_path / "full", "same")
