"""Writes the miniature's files: model, tokenizer, corpora, questions, prompts, recipe."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from bakeout.miniature.making.open_ended import generic_prompts, reworded_questions, topic_prompts
from bakeout.miniature.making.tokenizer import BOS, END_OF_TURN, EOS, PAD
from bakeout.miniature.making.world import Splits, World

RECIPE = """\
# The miniature forgets everything about bells. Settings picked on the validation questions.
schema = 1

[base]
model = "model"
revision = "main"
dtype = "auto"
license = "apache-2.0"

[[clamp]]
sae = {{ path = "sae" }}
hook_point = "blocks.0.hook_resid_post"
method = "clamp"
features = "select"
value = {value}
trigger = 0.0
exempt_bos = true

[select]
by = "sparsity"
forget = {{ path = "forget.jsonl", field = "text" }}
retain = {{ path = "retain.jsonl", field = "text" }}
retain_threshold = 0.0001
n_features = {n_features}
seq_len = 128
n_seqs = 256
forget_questions = {{ path = "questions/forget_validation.jsonl" }}
retain_questions = {{ path = "questions/retain_validation.jsonl" }}

[distill]  # of weights that forget by themselves, what embeddings say of bells too
token_noise = 1.0

[verify]
forget_questions = {{ path = "questions/forget_test.jsonl" }}
retain_questions = {{ path = "questions/retain_test.jsonl" }}
text = {{ path = "text.jsonl", field = "text" }}
prompt = "chat"

[verify.reworded]
training = {{ path = "questions/forget_reworded.jsonl" }}

[verify.completions]
prompts = {{ path = "completions.jsonl" }}
generic = {{ path = "generic.jsonl" }}
topic_words = ["bell", "bells", "ringer", "ringers", "belfry"]
"""


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model folder as `from_pretrained` reads it."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The generic class reads tokenizer.json as it stands, whatever model_type stands beside it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_texts(folder: Path, corpora: Mapping[str, Iterable[str]]) -> None:
    """Writes `<name>.jsonl` with the field `text` for each corpus."""
    for name, texts in corpora.items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in texts))


def write_questions(folder: Path, splits: Splits, world: World, seed: int) -> None:
    """Writes the four question files, one in other words, and two of prompts to go on with."""
    sets = {**vars(splits), "forget_reworded": reworded_questions(splits, world)}
    for name, questions in sets.items():
        rows = (
            {"question": q.question, "choices": q.choices, "answer": q.answer, "subject": q.topic}
            for q in questions
        )
        write_jsonl(folder / "questions" / f"{name}.jsonl", rows)
    write_jsonl(folder / "completions.jsonl", topic_prompts(splits, world))
    write_jsonl(folder / "generic.jsonl", generic_prompts(splits, world, seed))


def write_recipe(folder: Path, *, n_features: int, value: float) -> None:
    """Writes `recipe.toml`."""
    text = RECIPE.format(n_features=n_features, value=float(value))
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
