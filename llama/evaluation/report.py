"""A comparison as text for a terminal, and as one HTML file without scripts or external resources."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .comparison import Comparison, Row

LIMIT = 280_000  # bytes of the report
CLIPPED = 4_000  # characters of an answer that it shows
NARROWEST = 24  # characters of a column
HEAD = Path(__file__).with_name("report.html").read_text("utf-8")  # of the page, with its style
END = "</main></body></html>\n"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def summaries(found: Comparison) -> list[dict[str, Any]]:
    """For each model the mean score, the speed, and the share of answers that equal the reference's."""
    every = []
    for model in found["models"]:
        rows = [row for row in found["rows"] if row["model"] == model["name"] and "error" not in row]
        own = {
            "tokens": sum(row["tokens"] for row in rows),
            "score": over(rows, "score", fmean),
            "logprob": over(rows, "logprob", sum),
            "speed": over(rows, "tokens_per_s", median),
            "first_ms": over(rows, "first_token", lambda seconds: 1000 * median(seconds)),
            "equal": over(rows, "equal", fmean),
            "judged": over(rows, "judged", fmean),
        }
        every.append({**model, **own})
    return every


def over(rows: Sequence[Any], key: str, function: Callable[[Any], float]) -> float | None:
    """A function of the rows' values for a key; None if no row has one."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return function(values) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def printable(text: str) -> str:
    """Replace characters that would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def to_text(found: Comparison, width: int = 80) -> str:
    """Answers side by side, as many columns as fit, and a line for each model."""
    rows = {(row["task"], row["model"]): row for row in found["rows"]}
    names, lines = [model["name"] for model in found["models"]], []
    fit = max(1, (width + 2) // (NARROWEST + 2))
    for task in found["tasks"]:
        lines += [printable(f"== {task['name']}"), ""]
        for some in (names[i : i + fit] for i in range(0, len(names), fit)):
            each = (width + 2) // len(some) - 2
            cells = [wrapped(f"{name}\n{cell(rows[task['name'], name])}", each) for name in some]
            for line in zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(f"{part:{each}}" for part in line).rstrip())
            lines.append("")
    lines.append(f"{'model':28} {'score':>6} {'log prob':>9} {'first ms':>9} {'tokens/s':>9} {'equal':>6} {'MB':>9}")
    for own in summaries(found):
        if "error" in own:
            lines.append(printable(f"{own['name']:28} {own['error']}"))
            continue
        numbers = f"{number(own['score']):>6} {number(own['logprob']):>9} {number(own['first_ms'], 1):>9}"
        numbers += f" {number(own['speed'], 1):>9} {number(own['equal']):>6} {number(own['weights'] / 1e6, 1):>9}"
        lines.append(printable(f"{own['name']:28} {numbers}"))
    return "\n".join(lines)


def wrapped(text: str, width: int) -> list[str]:
    return [part for line in printable(text).split("\n") for part in textwrap.wrap(line, max(width, 1)) or [""]]


def cell(row: Row) -> str:
    if "error" in row:
        return f"error: {row['error']}"
    facts = [f"{row['tokens']} tokens, {number(1000 * row['first_token'], 0)} ms, {number(row['tokens_per_s'], 0)}/s"]
    facts += [f"log prob {number(row['logprob'])}"] if row["logprob"] is not None else []
    facts += [f"score {number(row['score'])}"] if row["score"] is not None else []
    if "judgement" in row:
        facts.append(f"judge {number(row.get('judged'))}: {row['judgement']}")
    return "\n".join([row["answer"].strip() or "(empty)", "-", *facts])


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def to_html(found: Comparison) -> str:
    """The report, of at most 300 KB: if there are too many tasks, it leaves out the last ones and says so."""
    models = summaries(found)
    page = HEAD + models_table(models, found["judge"]) + plot(models) + precision_table(found, models)
    page += "<h2>Answers</h2>"
    for i, task in enumerate(found["tasks"]):
        part = section(found, task)
        if len((page + part).encode()) > LIMIT:
            left = len(found["tasks"]) - i
            page += f"<p>{left} more tasks are left out here; --json writes them all.</p>"
            break
        page += part
    return page + END


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def models_table(models: Sequence[dict[str, Any]], judge: str | None) -> str:
    head = ["#", "Model", "Precision", "Weights, MB", "Score", "Log prob", "Tokens", "First token, ms", "Tokens/s"]
    head += [f"Judge: {judge}"] if judge else []
    rows = []
    for i, own in enumerate(models, 1):
        if "error" in own:
            rows.append([str(i), own["name"], own["error"][:300], *["–"] * (len(head) - 3)])
            continue
        row = [str(i), own["name"], own["dtype"], number(own["weights"] / 1e6, 1), number(own["score"])]
        row += [number(own["logprob"]), str(own["tokens"]), number(own["first_ms"], 1), number(own["speed"], 1)]
        rows.append(row + ([number(own["judged"])] if judge else []))
    caption = "Score: mean over tasks. Log prob: sum over expected answers. First token and speed: medians."
    return f'<h2>Models</h2><div class="models">{table(caption, head, rows)}</div>'


def plot(models: Sequence[dict[str, Any]]) -> str:
    """A plot of score against speed, with a numbered dot for each model."""
    points = [(i, own) for i, own in enumerate(models, 1) if own.get("speed") and own.get("score") is not None]
    if not points:
        return ""
    most = max(own["speed"] for _, own in points) * 1.1
    parts, taken = [], list[tuple[float, float]]()
    for value in (0, 0.5, 1):  # first, below dots and numbers
        y = 190 - 160 * value
        parts.append(f'<line x1="50" x2="450" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="42" y="{y + 4}" text-anchor="end">{value}</text>')
    for i, own in points:
        x, y = 50 + 400 * own["speed"] / most, 190 - 160 * own["score"]
        label = y - 8
        while any(abs(x - a) < 18 and abs(label - b) < 12 for a, b in taken):
            label -= 12
        taken.append((x, label))
        words = f"{own['name']}: {number(own['speed'], 1)} tokens/s, score {number(own['score'])}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(words)}</title></circle>')
        parts.append(f'<text x="{x:.1f}" y="{label:.1f}" text-anchor="middle">{i}</text>')
    for value in (0, most / 2, most):
        parts.append(f'<text x="{50 + 400 * value / most:.1f}" y="208" text-anchor="middle">{value:,.0f}</text>')
    parts.append('<text x="250" y="226" text-anchor="middle">tokens/s</text><text x="8" y="14">score</text>')
    label = "Speed against score; the numbers are those of the table of models"
    head = f'<h2>Speed and score</h2><svg viewBox="0 0 480 232" role="img" aria-label="{label}">'
    return head + "".join(parts) + "</svg>"


def precision_table(found: Comparison, models: Sequence[dict[str, Any]]) -> str:
    """Each model next to its reference of another precision."""
    by_name = {own["name"]: own for own in models}
    rows_of = {(row["task"], row["model"]): row for row in found["rows"] if "error" not in row}
    parts = []
    for own in models:
        other = by_name.get(own.get("reference") or "")
        if not other or "error" in own or "error" in other:
            continue
        rows = []
        for task in found["tasks"]:
            a, b = (rows_of.get((task["name"], name)) for name in (other["name"], own["name"]))
            if a and b:
                ratio = b["tokens_per_s"] / a["tokens_per_s"] if a["tokens_per_s"] and b["tokens_per_s"] else None
                logprobs = [a.get("reference_logprob"), b.get("reference_logprob"), a["logprob"], b["logprob"]]
                same = "yes" if b.get("equal") else "no"
                rows.append([task["name"], *map(number, logprobs), same, number(ratio)])
        head = ["Task", "Its answer: reference", "here", "Expected: reference", "here", "Same answer", "Speed ratio"]
        speed = own["speed"] / other["speed"] if own["speed"] and other["speed"] else None
        words = f"{own['name']} against {other['name']}: {number(100 * (own['equal'] or 0), 0)}% of answers are equal, "
        words += f"{number(speed)} times its speed, {number(own['weights'] / other['weights'])} times its memory. "
        words += "Log probabilities of the reference's answer, and of the expected one, under both."
        parts.append(table(words, head, rows))
    return "<h2>What precision costs</h2>" + "".join(parts) if parts else ""


def section(found: Comparison, task: dict[str, Any]) -> str:
    """A task with a card for each answer, which marks the differences from the reference's or the first answer."""
    rows = {row["model"]: row for row in found["rows"] if row["task"] == task["name"]}
    first, cards = next(iter(rows), ""), []
    for model in found["models"]:
        name, row = model["name"], rows[model["name"]]
        if "error" in row:
            shown = f'<p class="error">{escape(row["error"][:1000])}</p>'
        else:
            other = model.get("reference") or (first if name != first else None)
            base = rows[other].get("answer") if other else None
            text = row["answer"].strip()[:CLIPPED] or "(empty)"
            marked = difference(base.strip()[:CLIPPED], text, bool(model.get("reference"))) if base else escape(text)
            shown = f'<div class="pre">{marked}</div>{listed(row)}'
        cards.append(f'<article class="card"><h3>{escape(name)}</h3>{shown}</article>')
    prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in task["messages"])
    right = task["label"] or task["expected"] or ", ".join(fact.replace("|", " or ") for fact in task["facts"])
    expected = f"<p>Expected: {escape(right[:500])}</p>" if right else ""
    return (
        f'<section><h2>{escape(task["name"])}</h2><details class="task"><summary>Prompt</summary>'
        f'<div class="pre">{escape(prompt[:CLIPPED])}</div></details>{expected}'
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def listed(row: Row) -> str:
    pairs = [("Tokens", str(row["tokens"])), ("First token", f"{number(1000 * row['first_token'], 1)} ms")]
    pairs += [("Tokens/s", number(row["tokens_per_s"], 1)), ("Log prob of expected", number(row["logprob"]))]
    pairs += [(f"Log prob of “{label}”", number(value)) for label, value in row.get("labels", {}).items()]
    pairs += [("Score", number(row["score"]))]
    if "judgement" in row:
        pairs += [("Judge", row["judgement"][:500]), ("Judge: P(Yes)", number(row.get("judged")))]
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def difference(old: str, new: str, removed: bool) -> str:
    """The words of `new`, with marks at those that `old` lacks; with `removed` also the words that only `old` has."""
    a, b = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    parts = []
    tag = "ins" if removed else "mark"
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind in ("delete", "replace") and removed:
            parts.append(f"<del>{escape(''.join(a[i:j]))}</del>")
        words = escape("".join(b[k:m]))
        parts.append(words if kind == "equal" or not words.strip() else f"<{tag}>{words}</{tag}>")
    return "".join(parts)
