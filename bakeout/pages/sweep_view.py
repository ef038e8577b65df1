"""What a person and a script see of a sweep; `bakeout sweep` from its arguments to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from bake.new_folder import write_whole
from bake.questions.alignment import alignment
from bake.questions.forms import forms_beside
from bake.recipe import Recipe
from bake.scale.cluster import cluster
from bake.search.asking_bench import Scored
from bake.search.grid import GridError, parse_grid
from bake.search.sweep import CONTROLS, Objective, Reported, SweepReport, run_sweep
from bakeout.pages.selection_view import write_recipe
from bakeout.terminal import console, progress, table_of, write_json

SCHEMA = 1
REPORT, WINNER, PAGE = "report.json", "recipe.toml", "sweep.html"


def sweep_recipe(
    file: Path,
    grid: list[str],
    out: Path,
    objective: str,
    floor: float,
    storage: str | None,
    json_file: Path | None,
    device: str,
    dtype: str | None,
    ray: str | None,
) -> None:
    """`bakeout sweep`: measure, print the front, write the winner, the report and the page.

    Args:
        file: the recipe.
        grid: axes with their settings.
        out: folder for what is found, and for the study where no storage has it.
        objective: one of `Objective`.
        floor: as `run_sweep` takes it.
        storage: URL of a PostgreSQL that has the study.
        json_file: where the report goes too.
        device: as torch names it, where the model runs.
        dtype: in which it runs; what the recipe says by default.
        ray: of the cluster that counts and measures, as `cluster` takes it.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    if objective not in get_args(Objective):
        raise GridError(
            f"--objective {objective}: expected one of {', '.join(get_args(Objective))}"
        )
    if not 0 <= floor <= 1:
        raise GridError(f"--floor {floor}: expected a share of the base's accuracy, 0 to 1")
    recipe = Recipe.load(file)
    axes = parse_grid(grid)
    with progress("sweep") as advance, cluster(ray) as crew:
        report = run_sweep(
            recipe,
            axes,
            out,
            objective="forget" if objective == "forget" else "alignment",
            floor=floor,
            device=device,
            dtype=dtype,
            storage=storage,
            crew=crew,
            progress=advance,
        )
    if report is None:
        console().print("another process is measuring the last points, and will report them")
        return
    from bakeout.pages.search_pages import sweep_page

    write_recipe(report.recipe, out / WINNER, force=True)
    found = sweep_dict(report)
    write_json(found, out / REPORT)
    write_whole(out / PAGE, sweep_page(found), option=f"output {out / PAGE}")
    if json_file is None or str(json_file) != "-":
        show_sweep(report, out)
    if json_file is not None:
        write_json(found, json_file)


def show_sweep(report: SweepReport, out: Path) -> None:
    """Print the Pareto front with its controls, and the best point on the test split."""
    screen, form = console(), report.form
    base = report.base
    n = report.n_questions
    screen.print(
        f"{len(report.measured)} points on {n['validation']['forget']} forget and "
        f"{n['validation']['retain']} retain questions of the validation split ({form}); base "
        f"{base.forget[form]:.3f} and {base.retain[form]:.3f}. Pareto front:\n",
        markup=False,
    )
    table = table_of("point", "forget", "retained", "alignment", *CONTROLS)
    for one in report.front:
        controls = (
            f"{s.forget[form]:.3f} / {s.retain[form]:.3f}" if s else "–"
            for s in map(one.controls.get, CONTROLS)
        )
        mark = " *" if one.measured == report.best.measured else ""
        table.add_row(
            f"{one.measured.point}{mark}",
            f"{one.measured.forget:.3f}",
            f"{one.measured.retain:.3f}",
            f"{one.alignment:.3f}",
            *controls,
        )
    screen.print(table)
    screen.print(
        f"\nbest by {report.objective}: {report.best.measured.point}; on the test split "
        f"({n['test']['forget']} forget and {n['test']['retain']} retain questions):\n",
        markup=False,
    )
    screen.print(_test_table(report))
    screen.print(f"\n{out / WINNER}, {out / PAGE}", markup=False)


def _test_table(report: SweepReport) -> Table:
    forms = forms_beside(report.form)
    columns = [f"{side}\n{form}" for side in ("forget", "retained") for form in forms]
    table = table_of("", *columns, "loss added\nnats/token", "tokens\nfired")
    base = report.test["base"]
    for name, one in report.test.items():
        table.add_row(
            name,
            *(f"{one.forget[form]:.3f}" for form in forms),
            *(f"{one.retain[form]:.3f}" for form in forms),
            f"{(one.loss or 0) - (base.loss or 0):+.4f}",
            str(one.tokens_fired),
        )
    return table


def sweep_dict(report: SweepReport) -> dict[str, Any]:
    """The JSON of a sweep."""
    form, base = report.form, report.test["base"]

    def test(one: Scored) -> dict[str, Any]:
        return _scored(one) | {
            "loss_added": (one.loss or 0) - (base.loss or 0),
            "alignment": alignment(
                one.forget[form], base.forget[form], one.retain[form], base.retain[form]
            ),
        }

    return {
        "schema": SCHEMA,
        "objective": report.objective,
        "floor": report.floor,
        "prompt": form,
        "questions": report.n_questions,
        "validation": {
            "base": _scored(report.base),
            "points": [
                {
                    "settings": dict(found.point.settings),
                    "forget": found.forget,
                    "retain": found.retain,
                    **{k: found.about[k] for k in ("features", "tokens_fired", "seconds")},
                }
                for found in report.measured
            ],
            "front": [_reported(one) for one in report.front],
            "best": _reported(report.best),
        },
        "test": {name: test(one) for name, one in report.test.items()},
    }


def _reported(one: Reported) -> dict[str, Any]:
    return {
        "settings": dict(one.measured.point.settings),
        "forget": one.measured.forget,
        "retain": one.measured.retain,
        "alignment": one.alignment,
        "controls": {name: _scored(control) for name, control in one.controls.items()},
    }


def _scored(one: Scored) -> dict[str, Any]:
    return {"forget": one.forget, "retain": one.retain, "tokens_fired": one.tokens_fired}
