"""Keeps the generated parts of README.md true: the tables of benchmarks and evaluations, and the list of files.

python -m benchmarks.readme           rewrite the parts
python -m benchmarks.readme --check   exit 1 if the README is behind, and say where
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

from intarsia.app.evaluation.bench import benches
from intarsia.composition.method import methods

from .report import RESULTS, load

ROOT = Path(__file__).parents[1]
LONGEST = 24  # rows of a table of an evaluation; longer ones are on its own page
FOLDERS = ("app", "pipelines", "composition", "training", "kernels", "assets", "benchmarks", "tests")
OTHERS = (
    ("Makefile", "the commands: studio, test, check, mini, benchmarks"),
    ("pyproject.toml", "the package: folders, dependencies, settings of the tools"),
    ("constraints.txt", "the versions everything is tested with"),
    (".ci/run", "what every change must pass"),
    ("LICENSE", "Apache License 2.0"),
    ("NOTICE", "the works Mini learned from, and their licences"),
    ("CHANGELOG.md", "what changed"),
)


def table() -> str:
    """Make the benchmark table of all result files."""
    results = load()
    if not results:
        return "Not measured yet: `make benchmarks`."
    lines = ["| What | Intarsia | plain diffusers | ratio | asked | command |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [row.markdown(f"python -m benchmarks.{name}") for name, rows, _ in results for row in rows]
    machine = results[0][2]
    versions = machine["versions"]
    lines += [
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB; Python {machine['python']}, "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}. `make benchmarks` measures all of it.",
    ]
    return "\n".join(lines)


def evaluations() -> str:
    """Show the tables (but the longest) of every evaluation whose summary was put into `results/evaluations`."""
    parts: list[str] = []
    for path in sorted((RESULTS / "evaluations").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"**{found['title']}** (`intarsia evaluate {found['header']['bench']}{flags(found['header'])}`)")
        for one in (table for table in found["tables"] if len(table["rows"]) <= LONGEST):
            lines = [" | ".join(map(str, row)) for row in (one["columns"], ["---"] * len(one["columns"]), *one["rows"])]
            parts += [f"*{one['title']}*", "\n".join(f"| {line} |" for line in lines)]
            parts += [one["note"]] if one["note"] and one["note"] not in parts else []
    return "\n\n".join(parts) or "Not measured yet."


def adapters() -> str:
    """Show what became of every adapter file: ours by its error, plain diffusers in words."""
    path = RESULTS / "adapters" / "files.json"
    if not path.is_file():
        return "Not measured yet: `python -m benchmarks.adapter_files`."
    content = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["family"], row["dialect"], row["diffusers"]), []).append(row)
    lines = ["| family | spelling | kinds | our largest error | plain diffusers |", "| --- | --- | --- | --- | --- |"]
    for (family, dialect, theirs), rows in groups.items():
        kinds, worst = ", ".join(row["kind"] for row in rows), max(row["error"] for row in rows)
        lines.append(f"| {family} | {dialect} | {kinds} | {worst:.0e} | {theirs} |")
    versions = content["machine"]["versions"]
    lines += [
        "",
        f"diffusers {versions['diffusers']}, PEFT {versions['peft']}; `python -m benchmarks.adapter_files`. "
        "(Kohya names for FLUX.1: diffusers asserts its full width, which a tiny model has not.)",
    ]
    return "\n".join(lines)


def ways() -> str:
    """List every way to compose, from its own file."""
    lines = ["| method | what it does | needs | works on | from |", "| --- | --- | --- | --- | --- |"]
    for method in methods().values():
        needs = ", ".join(sorted(method.needs)) or "nothing"
        lines.append(
            f"| {method.name} | {method.help} | {needs} | {', '.join(method.families)} | {method.paper or 'ours'} |"
        )
    return "\n".join(lines)


def composition() -> str:
    """Show what each way to compose costs for N concepts, as multiples of one picture with one adapter."""
    from .composition import COUNTS, GRADIENTS, ratios

    parts: list[str] = []
    for path in sorted((RESULTS / "composition").glob("composition_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found, machine, settings = ratios(content), content["machine"], content["settings"]
        names = list(dict.fromkeys(key.split()[0] for key in found))
        chart = path.with_suffix(".svg")
        parts.append(f"![Seconds by number of concepts]({chart.relative_to(ROOT).as_posix()})")
        lines = ["| method | " + " | ".join(f"N = {count}" for count in COUNTS) + " |", "| --- " * 5 + "|"]
        for name in names:
            cells = [_cell(found.get(f"{name} {count}")) for count in COUNTS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
        parts.append(
            "Seconds (in brackets the denoiser's operations) as multiples of one picture with one adapter. "
            f"{settings['shape']} at {settings['width']:g} of its width, {settings['size']} pixels, "
            f"{settings['steps']} steps; {machine['threads']} thread of {machine['processor']} ({machine['device']}), "
            f"torch {machine['versions']['torch']}. `python -m benchmarks.composition`; methods with gradients: "
            f"`python -m {GRADIENTS}`."
        )
        if "beside" in content:
            ours, least = content["beside"]["composite 4"], content["beside"]["batch of 4"]
            parts.append(
                f"Composite over four concepts costs {ours / least:.2f} x of one batch of four plain pictures with one "
                "adapter, taken in turns."
            )
    return "\n\n".join(parts) or "Not measured yet: `python -m benchmarks.composition`."


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['seconds']:.2f} ({found['operations']:.2f})"


def flags(header: dict[str, Any]) -> str:
    """The flags that were not left at their defaults, as they are typed."""
    own = benches()[header["bench"]].options().model_dump(mode="json")
    given = {key: value for key, value in header["options"].items() if own[key] != value}
    return "".join(f" --{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in given.items())


def files() -> str:
    """List every Python file with the first line of its docstring, and the few other files by hand."""
    lines: list[str] = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            source = path.read_text(encoding="utf-8")
            if source.strip():
                name = path.relative_to(ROOT).as_posix()
                lines.append(f"{name:<46} {first_line(source, name)}")
    lines += [f"{name:<46} {text}" for name, text in OTHERS]
    return "```text\n" + "\n".join(lines) + "\n```"


def first_line(source: str, name: str) -> str:
    """Give the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(source))
    if not text:
        raise SystemExit(f"{name} has no docstring; README.md shows its first line.")
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0]
    return sentence.removesuffix(".")


def filled(text: str, part: str, content: str) -> str:
    """Put `content` between the two comments that mark a part of the README."""
    begin, end = f"<!-- {part}: made by benchmarks/readme.py -->", f"<!-- end of {part} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"README.md has no part between {begin!r} and {end!r}.")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = before
    for part, content in (
        ("adapters", adapters()),
        ("benchmarks", table()),
        ("methods", ways()),
        ("composition", composition()),
        ("evaluations", evaluations()),
        ("files", files()),
    ):
        one = filled(before, part, content)
        if one != before and "--check" in sys.argv[1:]:
            print(f"README.md: the part {part!r} is behind; run: python -m benchmarks.readme", file=sys.stderr)
        after = filled(after, part, content)
    if "--check" in sys.argv[1:]:
        raise SystemExit(after != before)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
