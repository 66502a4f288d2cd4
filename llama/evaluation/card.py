"""The benchmarks of MODEL_CARD.md, run by lm-evaluation-harness, next to the published row."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..args import ModelArgs
from .harness import HarnessModel

log = logging.getLogger(__name__)
CODE = "HF_ALLOW_CODE_EVAL"  # the harness runs code that a model has written only if this is 1


class Task(NamedTuple):
    name: str  # in the harness
    shots: int  # examples, as in the paper
    metric: str


class Group(NamedTuple):
    name: str  # of a column of the card
    tasks: Sequence[Task]  # the score is their mean
    note: str = ""  # how it differs from the published benchmark
    code: bool = False  # runs code that the model has written


COMMONSENSE = (
    *(Task(name, 0, "acc_norm") for name in ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")),
    *(Task(name, 0, "acc") for name in ("social_iqa", "winogrande")),
    Task("commonsense_qa", 7, "acc"),
)
CODE_TASKS = Task("humaneval", 0, "pass@1"), Task("mbpp", 3, "pass_at_1")
JUDGED = "multiple choice; published: answers judged by a model"
GENERATED = "classifies given texts; published: share of toxic generations"
GROUPS = (
    Group("code", CODE_TASKS, "runs code that the model has written", code=True),
    Group("commonsense", COMMONSENSE, "acc_norm where the harness has it"),
    Group("world knowledge", [Task("nq_open", 5, "exact_match"), Task("triviaqa", 5, "exact_match")]),
    Group("reading", [Task("squadv2", 0, "f1"), Task("boolq", 0, "acc")], "without QuAC, which the harness lacks"),
    Group("math", [Task("gsm8k_cot", 8, "exact_match"), Task("minerva_math", 4, "exact_match")]),
    Group("MMLU", [Task("mmlu", 5, "acc")]),
    Group("BBH", [Task("bbh_cot_fewshot", 3, "exact_match")]),
    Group("AGIEval", [Task("agieval_en", 3, "acc")], "3 examples; the paper has 3 to 5"),
    Group("TruthfulQA", [Task("truthfulqa_mc2", 0, "acc")], JUDGED),
    Group("ToxiGen", [Task("toxigen", 0, "acc")], GENERATED),
)
# As MODEL_CARD.md has them, in the order of GROUPS; its scores for TruthfulQA and ToxiGen are not comparable.
PUBLISHED = {
    "Llama 1 7B": (14.1, 60.8, 46.2, 58.5, 6.95, 35.1, 30.3, 23.9),
    "Llama 1 13B": (18.9, 66.1, 52.6, 62.3, 10.9, 46.9, 37.0, 33.9),
    "Llama 1 33B": (26.0, 70.0, 58.4, 67.6, 21.4, 57.8, 39.8, 41.7),
    "Llama 1 65B": (30.7, 70.7, 60.5, 68.6, 30.8, 63.4, 43.5, 47.6),
    "Llama 2 7B": (16.8, 63.9, 48.9, 61.3, 14.6, 45.3, 32.6, 29.3),
    "Llama 2 13B": (24.5, 66.9, 55.4, 65.8, 28.7, 54.8, 39.4, 39.1),
    "Llama 2 70B": (37.5, 71.9, 63.6, 69.4, 35.2, 68.9, 51.2, 54.2),
}
SHAPES = {(4096, 32): "Llama 2 7B", (5120, 40): "Llama 2 13B", (8192, 80): "Llama 2 70B"}  # (dim, n_layers)


class Score(NamedTuple):
    group: str
    percent: float | None  # None if a task could not be run
    published: float | None
    note: str
    tasks: dict[str, dict[str, Any]]  # all metrics of each


def published_row(args: ModelArgs, name: str | None = None) -> dict[str, float]:
    """The published scores of the model `name`, by default of the model with this shape. ValueError for an unknown
    name."""
    if name is not None and name not in PUBLISHED:
        raise ValueError(f"published is {name!r}; it must be one of {', '.join(PUBLISHED)}")
    shape = SHAPES.get((args.dim, args.n_layers)) if args.vocab_size <= 32064 else None
    found = PUBLISHED.get(name or shape or "", ())
    return {group.name: score for group, score in zip(GROUPS, found, strict=False)}


def evaluate(
    model: HarnessModel,
    groups: Iterable[Group] = GROUPS,
    published: str | None = None,
    limit: float | None = None,
    include_path: str | None = None,
) -> list[Score]:
    """The score of each group. `limit` is the harness's: documents of a task, or the fraction of all."""
    from lm_eval.tasks import TaskManager

    row, scores = published_row(model.llama.model.params, published), []
    manager = TaskManager(include_path=include_path)
    for group in groups:
        notes, missing = [group.note] if group.note else [], list[str]()
        found, percents = dict[str, dict[str, Any]](), list[float]()
        allowed = not group.code or os.environ.get(CODE) == "1"
        if not allowed:
            notes.append(f"set {CODE}=1 to allow it")
        for task in group.tasks if allowed else ():
            try:
                found[task.name] = run_task(model, task, limit, manager, group.code)
                percents.append(100 * metric(found[task.name], task.metric))
            except (OSError, ValueError, LookupError, ImportError) as error:
                text = " ".join(str(error).split())[:200]
                log.warning("%s cannot be run, as its data set or a package is missing: %s", task.name, text)
                missing.append(task.name)
        if missing:
            notes.append(f"missing: {', '.join(missing)}")
        percent = sum(percents) / len(percents) if percents and not missing else None
        scores.append(Score(group.name, percent, row.get(group.name), "; ".join(notes), found))
    return scores


def run_task(model: HarnessModel, task: Task, limit: float | None, manager: Any, code: bool) -> dict[str, Any]:
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[task.name],
        num_fewshot=task.shots,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=manager,
        confirm_run_unsafe_code=code,
    )
    found: dict[str, Any] = results["results"][task.name] if results else {f"{task.metric},none": 0.0}
    return found


def metric(found: dict[str, Any], name: str) -> float:
    """The value of a metric, with the first of the harness's filters for it."""
    values = [value for key, value in found.items() if key.partition(",")[0] == name]
    if not values:
        raise LookupError(f"the harness has no metric {name}, but {', '.join(found)}")
    return float(values[0])


def table(scores: Iterable[Score]) -> str:
    """The scores as a table in Markdown."""
    rows = ["| benchmark | here | published | |", "|---|---:|---:|---|"]
    for score in scores:
        cells = [f"{value:.1f}" if value is not None else "" for value in (score.percent, score.published)]
        rows.append(f"| {score.group} | {cells[0]} | {cells[1]} | {score.note} |")
    return "\n".join(rows)


def write(scores: Sequence[Score], folder: Path) -> None:
    """Write card.json and card.md to a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [score._asdict() for score in scores]
    (folder / "card.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    (folder / "card.md").write_text(table(scores) + "\n", encoding="utf-8")
