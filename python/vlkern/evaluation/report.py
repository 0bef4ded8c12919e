"""What an evaluation leaves: tables for the terminal, and results.json, results.md and plots in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkern._files import check_folder, write_file
from vlkern.evaluation.tables import Table, cut, percent

#: Directions, and how they are written in tables.
_WAYS = {"text_to_image": "T→I", "image_to_text": "I→T"}
#: Rows of the classes' table on a terminal; results.md has all.
ROWS = 40


def _both(result: dict[str, Any], kind: str) -> list[str]:
    return [percent(v) for way in _WAYS for v in result[way][kind].values()]


def _head(result: dict[str, Any]) -> list[str]:
    return [f"{short} @{k}" for way, short in _WAYS.items() for k in result[way]["recall"]]


def retrieval_table(result: dict[str, Any]) -> Table:
    """Recall of both directions above what chance gives."""
    title = f"retrieval: {result['pictures']} pictures, {result['texts']} texts"
    rows = [["recall", *_both(result, "recall")], ["chance", *_both(result, "chance")]]
    return Table(title, ["", *_head(result)], rows)


def language_table(results: dict[str, dict[str, Any]]) -> Table:
    """A language a line, and their mean; a k that is too large for a language is left out there."""
    most = max(results.values(), key=lambda r: r["pictures"])
    columns = [(way, k) for way in _WAYS for k in most[way]["recall"]]
    largest = list(most["text_to_image"]["recall"])[-1]
    rows, total = [], dict[tuple[str, str], list[float]]()
    for language, result in results.items():
        values = [result[way]["recall"].get(k) for way, k in columns]
        for column, value in zip(columns, values, strict=True):
            total.setdefault(column, []).extend([] if value is None else [value])
        chance = result["text_to_image"]["chance"].get(largest)
        rows.append([language, str(result["pictures"]), *map(_cell, values), _cell(chance)])
    rows.append(["mean", "", *(percent(sum(total[c]) / len(total[c])) for c in columns), ""])
    head = ["language", "pictures", *_head(most), f"chance @{largest}"]
    return Table(f"retrieval in {len(results)} languages", head, rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else percent(value)


def zero_shot_tables(result: dict[str, Any]) -> tuple[Table, Table]:
    """Accuracy of all, and of each class, the most frequent classes first."""
    ks = [k for k in (1, 5) if f"top{k}" in result]
    title = (
        f"zero-shot: {result['pictures']} pictures, {result['classes']} classes, {len(result['templates'])} templates"
    )
    rows = [
        ["accuracy", *(percent(result[f"top{k}"]) for k in ks), percent(result["mean_over_classes"])],
        ["chance", *(percent(result[f"chance{k}"]) for k in ks), percent(result["chance1"])],
    ]
    all_in_one = Table(title, ["", *(f"top-{k}" for k in ks), "mean of classes' top-1"], rows)
    order = sorted(result["by_class"].items(), key=lambda item: -item[1]["pictures"])
    lines = [
        [name, str(c["pictures"]), *(percent(c[f"top{k}"]) for k in ks), c["taken_for"] or ""] for name, c in order
    ]
    classes = Table("zero-shot by class", ["class", "pictures", *(f"top-{k}" for k in ks), "mostly taken for"], lines)
    return all_in_one, classes


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables of a results.json."""
    found: list[Table] = []
    if "retrieval" in results:
        found.append(retrieval_table(results["retrieval"]))
    if "languages" in results:
        found.append(language_table(results["languages"]))
    if "zero_shot" in results:
        found += zero_shot_tables(results["zero_shot"])
    return found


def show(results: dict[str, Any]) -> None:
    """Print the tables; a long one is cut."""
    for table in tables(results):
        Table(table.title, table.head, cut(table.rows, ROWS)).show()


def markdown(results: dict[str, Any]) -> str:
    """The tables and what they are about."""
    facts = [f"* {name}: {results[name]}" for name in ("model", "data", "pictures")]
    skipped = [f"* left out: {line}" for line in results["skipped"]]
    return "\n\n".join(["# Evaluation", "\n".join(facts + skipped), *(t.markdown() for t in tables(results))]) + "\n"


def write(results: dict[str, Any], plots: Sequence[tuple[str, bytes]], folder: Path) -> list[str]:
    """Write plots, results.md and, last of all, results.json; each file is there completely or not at all.

    Returns:
        The names of the files.

    Raises:
        UserError: the folder takes no file.
    """
    check_folder("--out", folder)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    files = [*plots, ("results.md", markdown(results).encode()), ("results.json", text.encode())]
    for name, content in files:
        write_file(folder / name, content)
    return [name for name, _ in files]
