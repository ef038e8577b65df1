"""Task files for lm-evaluation-harness: of local questions, and of data sets that it lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bake.errors import BakeoutError
from bake.questions.multiple_choice import LETTERS, Question

TASKS = Path(__file__).parent
"""Tasks by name that the harness does not bring along, with their data on the hub."""
TASK_NAME = re.compile(r"[a-z0-9_]+")
TEMPLATE = (
    "The following are multiple choice questions (with answers)"
    "{% if topic %} about {{topic}}{% endif %}.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
    "D. {{choices[3]}}\nAnswer:"
)
"""What a local question looks like. Source: the harness's own tasks `wmdp_bio` and `mmlu`."""


class HarnessError(BakeoutError):
    """lm-evaluation-harness is not installed, or a task cannot be loaded or scored."""


def write_tasks(folder: Path, tasks: Mapping[str, Sequence[Question]]) -> None:
    """Task files for local questions, which `lm_eval --include_path FOLDER` takes too.

    Args:
        folder: an existing folder; one `.yaml` and one `.jsonl` per task are written into it, and
            the harness keeps what it makes of them there.
        tasks: per name, its questions.

    Raises:
        HarnessError: a name is not made of a to z, 0 to 9 and _.
    """
    for name, questions in tasks.items():
        if not TASK_NAME.fullmatch(name):
            raise HarnessError(f"task {name!r}: expected a name of a to z, 0 to 9 and _")
        data = folder.resolve() / f"{name}.jsonl"
        rows = [
            {
                "question": question.question,
                "choices": question.choices,
                "answer": question.answer,
                "topic": question.topic or "",
                "row": question.row,
            }
            for question in questions
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(data.with_suffix("")),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": TEMPLATE,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML, and quotes whatever a path may hold.
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        data.with_suffix(".yaml").write_text(text, encoding="utf-8")
