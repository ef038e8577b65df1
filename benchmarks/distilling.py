"""What distilling leaves of the clamp: against teacher and base, in minutes and memory.

On the shipped miniature, or on a recipe of yours. Each method writes a folder, which `verify` asks
the recipe's questions and lets go on with its prompts. The memory of a step at gemma-2-2b's shape
is worked out from sizes.

    python benchmarks/distilling.py [--methods merged,rmu,npo] [--seeds 1] [--keep DIR]
    python benchmarks/distilling.py --gemma FOLDER --texts FOLDER [--steps 60]

FOLDER is what `make gemma` leaves (`recipe.toml`, `base/`); that of the texts holds `forget.jsonl`
and `retain.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.distill.unlearners import UNLEARNERS
from bake.recipe import Recipe
from bakeout.verbs.demo import MINIATURE
from bakeout.verbs.training import distill_into
from verify.report.findings import EngineReport, VerifyReport
from verify.run import verify_folder

FLOAT = 4
GEMMA_2_2B = {"d": 2304, "layers": 26, "mlp": 9216, "q": 2048, "kv": 1024, "vocab": 256_000}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    engine: EngineReport
    minutes: float | None = None
    retain_kl: float | None = None
    forget_kl: float | None = None


def measured(report: VerifyReport, name: str) -> EngineReport:
    engine = report.engine(name)
    assert engine is not None
    return engine


def line(row: Row, report: VerifyReport, form: str) -> str:
    engine = row.engine
    assert engine.forget is not None and engine.retain is not None
    said = [
        f"{row.name:<20}{getattr(engine.forget, form):>8.3f}{getattr(engine.retain, form):>10.3f}"
    ]
    said += [f"{0.0 if engine.loss_added is None else engine.loss_added:>+12.4f}"]
    for kl in (row.forget_kl, row.retain_kl):
        said.append("           –" if kl is None else f"{kl:>12.4f}")
    said.append("         –" if row.minutes is None else f"{row.minutes:>10.1f}")
    said.append(f"   {right(report, engine.name)}")
    return "".join(said).rstrip()


def right(report: VerifyReport, engine: str) -> str:
    """Right answers to prompts on the topic, and on others; nothing where there are none."""
    if report.completions is None:
        return ""
    found = {t.source: t.right for t in report.completions.tallies if t.variant == engine}
    for of in report.completions.engines:
        if of.engine == engine:
            found = {"topic": of.topic, "generic": of.generic}
    return ", ".join(f"{source} {s.right} of {s.n}" for source, s in found.items() if s is not None)


def rows_of(
    recipe: Path,
    method: str,
    seed: int,
    out: Path,
    cache: Path,
    kinds: frozenset[str],
    **table: object,
) -> tuple[list[Row], VerifyReport]:
    """Distil, and ask: base, teacher, student."""
    begun = time.perf_counter()
    entry = distill_into(recipe, out, method=method, seed=seed, cache=cache, **table)
    minutes = (time.perf_counter() - begun) / 60
    report = verify_folder(out, Recipe.load(recipe), kinds)
    held = entry.held_out
    student = Row(
        f"{method}, seed {seed}",
        measured(report, method),
        minutes,
        held.retain_kl,
        held.forget_kl,
    )
    rows = [Row("base", measured(report, "base")), Row("teacher", measured(report, "reference"))]
    return [*rows, student], report


def memory(rows: int, seq_len: int, rank: int | None) -> float:
    """Gigabytes of a step at gemma-2-2b's shape, in float32: weights, gradients, AdamW's moments,
    what the layers keep for the gradient, and a block of logits.
    """
    s, n = GEMMA_2_2B, 2 * rows * seq_len
    attention = 2 * s["d"] * (s["q"] + s["kv"])
    layer = attention + 3 * s["d"] * s["mlp"]
    sides = 2 * (s["d"] + s["q"]) + 2 * (s["d"] + s["kv"]) + 3 * (s["d"] + s["mlp"])
    trained = s["layers"] * (layer if rank is None else rank * sides)
    weights = s["layers"] * layer + s["vocab"] * s["d"]
    kept = 14 * s["d"] + 4 * s["mlp"] + 2 * (s["q"] + s["kv"]) + 3 * 8 * seq_len
    return FLOAT * (weights + 3 * trained + s["layers"] * n * kept + 6 * (1 << 25)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(UNLEARNERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        out, kinds = options.keep or Path(name), {"integrity", "choices", "loss"}
        recipe = MINIATURE / "recipe.toml"
        if options.gemma is not None:
            recipe, kinds = with_texts(options.gemma, options.texts), kinds | {"completions"}
        form = Recipe.load(recipe).verify.prompt  # type: ignore[union-attr]
        print(
            f"{'':<20}{'forget':>8}{'retained':>10}{'loss added':>12}{'KL forget':>12}"
            f"{'KL retain':>12}{'minutes':>10}   ({form} form; KL on held-out texts)"
        )
        shown = False
        for method in options.methods.split(","):
            for seed in range(options.seeds):
                folder = out / f"{method}-{seed}"
                rows, report = rows_of(
                    recipe,
                    method,
                    seed,
                    folder,
                    out / "cache",
                    frozenset(kinds),
                    steps=options.steps,
                )
                for row in rows[2 if shown else 0 :]:
                    print(line(row, report, form), flush=True)
                shown = True
    print("\na step at gemma-2-2b's shape, float32, worked out:")
    for rows, seq_len in ((16, 256), (2, 256)):
        for what, rank in (("all weights of the layers", None), ("LoRA of rank 16", 16)):
            size = memory(rows, seq_len, rank)
            print(f"  2 x {rows} pieces of {seq_len} tokens, {what}: {size:.0f} GB")


def with_texts(gemma: Path, texts: Path) -> Path:
    """The recipe of a folder, with a [distill] table, beside its own."""
    import tomli_w

    data = Recipe.load(gemma / "recipe.toml").to_dict()
    corpora = {
        side: {"path": str(texts.resolve() / f"{side}.jsonl")} for side in ("forget", "retain")
    }
    small = {"student": "lora", "batch_size": 4, "seq_len": 96, "n_texts": 512, "steps": 60}
    data["distill"] = {**corpora, **small, "learning_rate": 1e-3}
    path = gemma / "distill.toml"
    path.write_text(tomli_w.dumps(data), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
