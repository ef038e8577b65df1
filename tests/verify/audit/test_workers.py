"""Processes side by side say what one says, and are as many as there is room for."""

from __future__ import annotations

import os

import pytest

from bake.errors import OutputError
from tests.verify.audit.audited import audited, audited_world
from verify.audit import workers
from verify.audit.attempts import Attempt, Settings
from verify.audit.run_audit import measure
from verify.audit.subject import Subject
from verify.audit.target import Target
from verify.audit.workers import Workers, fitting_processes

ASKED = [{"model": name} for name in ("as it is", "base", "stripped")]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("workers")
    audited_world(folder)
    return audited(folder)


def dies(_: Target, settings: Settings) -> list[Attempt]:
    """Ends its process, as one does that the system kills."""
    os._exit(settings["code"])


def test_two_processes_say_what_one_says(subject: Subject) -> None:
    with Workers([subject], 3, 1) as pool:
        one = dict(pool.each(0, measure, ASKED, "plain"))
    with Workers([subject], 3, 2) as pool:
        assert dict(pool.each(0, measure, ASKED, "plain")) == one
        with pytest.raises(OutputError, match=r"a process was killed, .* run the same"):
            list(pool.each(0, dies, [{"code": 9}], "plain"))
    assert sorted(one) == [0, 1, 2]
    assert one[0] != one[1] == [{**one[2][0], "attack": "base"}]


def test_processes_are_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(workers, "available_memory", lambda: 64 << 30)
    assert fitting_processes(4 << 20, "cpu") == 8
    assert fitting_processes(1 << 30, "cpu") == 5  # 48 GiB, 8.5 each
    assert fitting_processes(64 << 30, "cpu") == 1
    assert fitting_processes(4 << 20, "cuda") == 1
