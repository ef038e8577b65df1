"""Real workers: on this machine, on two nodes, killed, lost, of another version."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from bake.errors import ScaleError
from bake.recipe import Recipe
from bake.scale.cluster import cluster
from bake.scale.crew import MOST_DEATHS, about_here
from bake.search.corpus_statistics import measure
from bake.search.sweep import run_sweep
from bakeout.cli import run
from bakeout.pages.sweep_view import sweep_dict
from tests.bake.scale.counted import BATCH, InProcess, assert_all_same
from tests.bake.scale.mortal import Broken, Mortal
from tests.bake.swept import AXES, without_times

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Two machines of one core each, as far as Ray can tell. A process may see one cluster only."""
    node = {"num_cpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def test_two_nodes_and_this_machine_alone_select_as_the_single_process(
    counted_recipe: Path,
    tmp_path: Path,
    two_nodes: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.load(counted_recipe)
    single = measure(recipe, cache=tmp_path / "single")
    told: list[tuple[str, float]] = []
    with cluster(two_nodes.address) as crew:
        assert crew is not None
        found = measure(
            recipe,
            cache=tmp_path / "nodes",
            crew=crew,
            progress=lambda *step: told.append(step),
        )
        assert crew.size == 2
        jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
        assert {job.entrypoint for job in jobs.values()} <= {"", "bakeout"}  # no command line
    assert_all_same(single, found)
    assert {what for what, _ in told} == {
        f"{side} {part}" for side in ("forget", "retain") for part in ("texts", "corpus")
    }
    assert [share for what, share in told if what == "retain corpus"][-1] == 1

    shown = []
    for options in (["--ray"], []):
        cache, page = tmp_path / f"own{options}", tmp_path / "page.html"
        command = [sys.executable, "-m", "bakeout", "features", *options, str(counted_recipe)]
        done = subprocess.run(
            [*command, "--html", str(page), "--force"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"BAKEOUT_CACHE": str(cache)},
        )
        assert (done.returncode, done.stderr) == (0, "")
        monkeypatch.setenv("BAKEOUT_CACHE", str(cache))
        capsys.readouterr()
        assert run(["select", str(counted_recipe), "--json", "-"]) == 0  # of what was counted
        shown.append((page.read_text(), capsys.readouterr().out))
    assert shown[0] == shown[1] and '"feature"' in shown[0][1]


def workers_here(kind: str = "FeatureWorker") -> list[psutil.Process]:
    """The workers that clusters of this process have started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ray::{kind}" in " ".join(process.cmdline()):  # which the dead have none of
                found.append(process)
    return found


def test_a_worker_killed_at_each_tenth_changes_nothing(
    counted_recipe: Path, tmp_path: Path, two_nodes: Cluster
) -> None:
    recipe = Recipe.load(counted_recipe)
    single = measure(recipe, cache=tmp_path / "single")
    tenths, killed = [n / 10 for n in range(1, 10)], []

    def kill(what: str, share: float) -> None:
        due = what == "forget corpus" and tenths and share >= tenths[0]
        if due and (alive := workers_here()):  # or when the next one has come
            worker = random.Random(tenths.pop(0)).choice(alive)
            worker.kill()
            killed.append(worker.pid)

    with cluster(two_nodes.address) as crew:
        found = measure(recipe, cache=tmp_path / "cache", crew=crew, progress=kill)
    assert len(killed) >= 8
    assert_all_same(single, found)


def test_a_sweep_whose_worker_is_killed_reports_as_the_single_process(
    swept_recipe: Path, tmp_path: Path, two_nodes: Cluster
) -> None:
    recipe, killed = Recipe.load(swept_recipe), []

    def kill(what: str, share: float) -> None:
        if share > 0.2 and not killed and (alive := workers_here("SettingWorker")):
            killed.append(alive[0].pid)
            alive[0].kill()

    with cluster(two_nodes.address) as crew:
        found = run_sweep(recipe, AXES, tmp_path / "crew", crew=crew, progress=kill)
        assert crew is not None and crew.size == 2
    single = run_sweep(recipe, AXES, tmp_path / "single")
    assert killed and single is not None and found is not None
    assert without_times(sweep_dict(found)) == without_times(sweep_dict(single))


def test_a_machine_that_is_lost_is_not_waited_for(
    counted_recipe: Path, tmp_path: Path, two_nodes: Cluster
) -> None:
    recipe = Recipe.load(counted_recipe)
    third = two_nodes.add_node(num_cpus=1)
    lost = False

    def lose(what: str, share: float) -> None:
        nonlocal lost
        if what == "forget corpus" and share >= 0.3 and not lost:
            lost = True
            two_nodes.remove_node(third, allow_graceful=False)

    with cluster(two_nodes.address) as crew:
        assert crew is not None
        found = measure(recipe, cache=tmp_path / "cache", crew=crew, progress=lose)
        assert lost and crew.size == 3
    assert_all_same(measure(recipe, cache=tmp_path / "single"), found)


def test_workers_of_another_version_are_refused(
    counted_recipe: Path, tmp_path: Path, two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "site" / "bakeout-9.9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bakeout\nVersion: 9.9.9\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(about.parent), *sys.path]))
        other = two_nodes.add_node(num_cpus=1)
    expected = f"a worker has bakeout 9.9.9, here it is {about_here()['bakeout']}; expected"
    monkeypatch.chdir(tmp_path)  # what lies in the current folder comes first on every worker
    with pytest.raises(ScaleError, match=expected), cluster(two_nodes.address) as crew:
        measure(Recipe.load(counted_recipe), cache=tmp_path / "cache", crew=crew)
    two_nodes.remove_node(other)


def test_what_kills_every_worker_is_given_up_and_so_are_workers_that_do_not_start(
    two_nodes: Cluster,
) -> None:
    with cluster(two_nodes.address) as crew:
        assert crew is not None
        crew.start(Mortal, memory=1 << 20)
        assert dict(crew.map("halved", ((n,) for n in range(6)))) == {n: n // 2 for n in range(6)}
        ended = crew.map("halved", ((n,) for n in range(6, 99)))
        with pytest.raises(ScaleError, match=f"{MOST_DEATHS} workers died of the same"):
            list(ended)
    with cluster(two_nodes.address) as crew:
        assert crew is not None
        crew.start(Broken, memory=1 << 20)
        with pytest.raises(ScaleError, match=r"do not start \(OSError: no such library\)"):
            list(crew.map("about", [()]))
    with cluster(two_nodes.address) as crew:
        assert crew is not None
        with pytest.raises(ScaleError, match=r"has no room for a worker, .* 1,000.0 GB of memory"):
            crew.start(Mortal, memory=10**12)


KILLED = """
import os, signal, sys
from pathlib import Path
import bake.scale.parts
from bake.recipe import Recipe
from bake.scale.cluster import cluster
from bake.search.corpus_statistics import measure
bake.scale.parts.PART_TOKENS = 1
def die(what, share):
    if what == "forget corpus" and share >= float(sys.argv[3]):
        print(share, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
with cluster("local") as crew:
    measure(Recipe.load(sys.argv[1]), cache=Path(sys.argv[2]), crew=crew, progress=die)
"""


def test_the_driver_killed_and_started_again(counted_recipe: Path, tmp_path: Path) -> None:
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    reached = 0.0
    for share in (0.2, 0.6):
        command = [sys.executable, "-c", KILLED, str(counted_recipe), str(cache), str(share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert float(done.stdout) > reached
        reached = float(done.stdout)
    crew: Any = InProcess()
    found = measure(recipe, cache=cache, crew=crew)
    n_windows = len(found.corpora["forget"].ids) * (1 - reached) + len(found.corpora["retain"].ids)
    assert len(crew.counted) <= n_windows // BATCH + 2  # a last part of each may be short
    assert_all_same(measure(recipe, cache=tmp_path / "single"), found)
    alive = [path for path in cache.iterdir() if path.name.startswith("bakeout-corpus-")]
    assert len(alive) == 2  # those of the killed are gone


def test_a_driver_that_is_told_to_stop_says_so_in_one_line(
    counted_recipe: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "bakeout", "select", str(counted_recipe), "--ray"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"BAKEOUT_CACHE": str(cache)},
    )
    while not list(cache.glob("bakeout-corpus-*")):  # its workers are about to load the model
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == "error: interrupted; the same command goes on where it was\n"
    assert not list(cache.glob("bakeout-corpus-*"))


def test_addresses_that_lead_nowhere(
    counted_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address, said in (
        ("127.0.0.1:1", "does not answer"),
        ("ray://127.0.0.1:10001", "is no address; expected HOST:PORT"),
    ):
        for verb in (["select"], ["sweep", "--out", "new", "--grid", "value=-1"]):
            assert run([*verb, str(counted_recipe), "--ray", address]) == 2
            line = capsys.readouterr().err
            assert line.startswith(f"error: --ray {address}: ") and said in line
            assert line.count("\n") == 1
