"""The commands of the library: `intarsia adapters import|list|inspect|edit|remove|restore|trash|folder|scan|export`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.errors import InputError
from ..pipelines.events import Progress
from . import present
from .cli_console import Console, complain, guarded, table
from .cli_flags import command, flag
from .cli_lists import Machine, cell, record, write
from .cli_tools import add_tools
from .studio import Change, Query, Studio

if TYPE_CHECKING:
    from .library_entry import Entry, Outcome

MACHINE = flag("machine", bool, "Write JSON.", "--json")
MEASURES = ("path", "kind", "rank", "alpha", "norm", "strongest", "effective_rank")  # of a layer, in a table
Names = Annotated[list[str], typer.Argument(help="Names in the library.", show_default=False)]
File = Annotated[str, typer.Argument(help="A .safetensors file, or a name in the library.", show_default=False)]
Family = Annotated[str, typer.Option(help="The family it is for, where the file does not tell.", show_default=False)]


def add_adapters(app: typer.Typer) -> None:
    """Register `adapters` and its commands."""
    group = typer.Typer(help="The library of adapters.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="adapters")
    group.command("import", help="Check adapter files and copy them into the library.")(_import)
    _add_list(group)
    group.command("suggest", help="Find the adapters a prompt asks for, by the model's reading of their words.")(
        _suggest
    )
    group.command("inspect", help="Say what an adapter file holds.")(_inspect)
    group.command("convert", help="Write an adapter file in another trainer's spelling.")(_convert)
    _add_edit(group)
    group.command("remove", help="Move adapters to the trash.")(_remove)
    group.command("restore", help="Take adapters out of the trash.")(_restore)
    group.command("trash", help="List the trash, or empty it.")(_trash)
    group.command("scan", help="Look for new, moved and vanished files in all folders.")(_scan)
    group.command("export", help="Write adapters with their texts and pictures for other studios.")(_export)
    folders = typer.Typer(help="Folders of other studios.", no_args_is_help=True, rich_markup_mode=None)
    group.add_typer(folders, name="folder")
    folders.command("add", help="List the adapters of a folder in place, without copying them.")(_folder_add)
    folders.command("list", help="List the folders.")(_folder_list)
    folders.command("remove", help="Leave a folder out of the library; its files stay.")(_folder_remove)
    folders.command("refused", help="List the files in folders that cannot be used, and why.")(_folder_refused)
    add_tools(group)


def _suggest(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.", show_default=False)],
    model: Annotated[str, typer.Option(help="Whose text encoders read it.")] = "mini",
    count: Annotated[int, typer.Option(help="The most to name.", min=1)] = 5,
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        found = studio.suggest(prompt, model, count)
        rows = [(one.name, f"{one.nearness:.2f}", one.text) for one in found]
        text = table(rows, ("name", "nearness", "by")) if rows else "No adapter of this model's family has words."
        write(machine, [record(one) for one in found], text)


def _import(
    files: Annotated[list[Path], typer.Argument(help=".safetensors files, or folders of them.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name in the library; the file's own if not given.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of an entry of that name.")] = False,
    family: Family = "",
    machine: Machine = False,
) -> None:
    console = Console(machine)
    with guarded(console), Studio() as studio:
        found = studio.adapter_files(files)
        if name is not None or replace:
            entries = [_import_as(studio, found, name, replace, family)]
            write(machine, [record(entry) for entry in entries], _adapters_table(entries))
            return
        outcomes: list[Outcome] = []
        for outcome in studio.import_adapters(found, family):
            outcomes.append(outcome)
            if outcome.error is not None:
                complain(present.show_error(outcome.error))
            if len(found) > 1 and not machine:
                console.show(Progress(stage="importing", step=len(outcomes), total=len(found)))
        entries = [outcome.entry for outcome in outcomes if outcome.entry is not None]
        if entries or machine:
            write(machine, [_outcome(one) for one in outcomes], _adapters_table(entries))
        if not found:
            console.note("There are no .safetensors files.")
        if len(entries) < len(found):
            raise typer.Exit(present.EXIT_PERSON)


def _import_as(studio: Studio, files: list[Path], name: str | None, replace: bool, family: str) -> Entry:
    if len(files) != 1:
        raise InputError(f"There are {len(files)} files, and --name or --replace is about one.", "Give one file.")
    if family:
        studio.shelf.decide(files[0], family)
    return studio.import_adapter(files[0], name or files[0].stem, replace)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    value: dict[str, Any] = {"file": str(outcome.path), "state": outcome.state}
    if outcome.error is not None:
        shown = present.show_error(outcome.error)
        value |= {"code": shown.code, "message": shown.message, "hint": shown.hint}
    return value | (record(outcome.entry) if outcome.entry is not None else {})


def _add_list(group: typer.Typer) -> None:
    parameters = [
        _positional("words", list[str] | None, "What to look for.", None),
        flag("family", str, "Only this family."),
        flag("algorithm", str, "Only this kind."),
        flag("role", str, "Only this role: concept, content or style."),
        flag("tag", str, "Only with this tag."),
        flag("favourite", bool, "Only favourites.", "--favourite"),
        flag("trashed", bool, "What lies in the trash.", "--trash"),
        flag("sort", str, "newest (the default), name or size."),
        flag("limit", int, "At most so many."),
        MACHINE,
    ]

    @command(group, "list", "List the library, or what is found in it.", parameters)
    def _(given: dict[str, Any]) -> None:
        machine = bool(given.pop("machine"))
        with guarded(Console(machine)), Studio() as studio:
            wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            wanted["text"] = " ".join(wanted.pop("words", ()))
            wanted.setdefault("limit", None)
            page = studio.shelf.page(Query(**wanted))
            entries = list(page.entries)
            shown = _adapters_table(entries)
            if not entries:
                everything = wanted.keys() <= {"text", "sort", "limit"} and not wanted["text"]
                empty = "The library is empty. Add files with: intarsia adapters import"
                shown = empty if everything else "Nothing was found."
            elif len(entries) < page.total:
                shown += f"\n{len(entries)} of {page.total}"
            write(machine, [record(entry) for entry in entries], shown)


def _inspect(
    file: File,
    model: Annotated[str, typer.Option(help="Match it with this model's modules.", show_default=False)] = "",
    family: Family = "",
    layers: Annotated[bool, typer.Option("--layers", help="Measure every layer too.")] = False,
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        values = studio.inspect(file, model, family).as_dict()
        text = _facts(values)
        if layers:
            measured = [record(layer) for layer in studio.measure(file).layers]
            values["layers"] = measured
            rows = [tuple(_figure(layer[name]) for name in MEASURES) for layer in measured]
            text += "\n\n" + table(rows, tuple(name.replace("_", " ") for name in MEASURES))
        write(machine, values, text)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _convert(
    file: File,
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    to: Annotated[str, typer.Option(help="kohya, diffusers or peft (a folder); none for .bin, .pt, .pth, .ckpt.")] = "",
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        made = studio.convert_adapter(file, to, out)
        told = "".join(f"\nNot the same: {text}." for text in made.lost) or " Every tensor is the same."
        write(machine, record(made), f"{made.path}: {made.layers} layers as {made.dialect} names them.{told}")


def _add_edit(group: typer.Typer) -> None:
    parameters = [
        _positional("entry", str, "Name in the library."),
        flag("tag", list[str], "Add a tag; may be repeated.", shown="TAG"),
        flag("untag", list[str], "Take a tag off; may be repeated.", shown="TAG"),
        flag("notes", str, "Notes of your own.", "--note"),
        flag("licence", str, "Its licence."),
        flag("favourite", bool, "Mark it as a favourite, or no more."),
        flag("trigger", str, "Its trigger words."),
        flag("name", str, "Another name.", "--rename"),
        MACHINE,
    ]

    @command(group, "edit", "Change an adapter's tags, texts or name.", parameters)
    def _(given: dict[str, Any]) -> None:
        machine = bool(given.pop("machine"))
        with guarded(Console(machine)), Studio() as studio:
            name = given.pop("entry")
            change = Change(**{key: value for key, value in given.items() if value is not None})
            values = record(studio.shelf.edit(name, change))
            write(machine, values, _facts(values))


def _remove(names: Names, machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        for name in names:
            studio.shelf.remove(name)
            if not machine:
                typer.echo(f"Moved {name} to the trash.")
        if machine:
            write(machine, {"removed": names}, "")


def _restore(names: Names, machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        entries = [studio.shelf.restore(name) for name in names]
        write(machine, [record(entry) for entry in entries], _adapters_table(entries))


def _trash(
    empty: Annotated[bool, typer.Option("--empty", help="Delete what lies in it for good.")] = False,
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        entries = list(studio.shelf.page(Query(trashed=True, limit=None)).entries)
        if empty:
            number = studio.shelf.empty_trash()
            write(machine, {"deleted": number}, f"Deleted {number} adapters.")
            return
        shown = _adapters_table(entries) if entries else "The trash is empty."
        write(machine, [record(entry) for entry in entries], shown)


def _scan(machine: Machine = False) -> None:
    console = Console(machine)
    with guarded(console), Studio() as studio:
        _scanned(studio, console)


def _scanned(studio: Studio, console: Console, **more: object) -> None:
    """Scan and tell what was found."""

    def progress(step: int, total: int) -> None:
        if not console.machine:
            console.show(Progress(stage="reading", step=step, total=total))

    values = record(studio.shelf.scan(progress))
    told = ", ".join(f"{number} {what}" for what, number in values.items() if number or what == "files")
    write(console.machine, values | more, f"Looked at {told}.")


def _export(
    names: Names,
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        made = [str(path) for path in studio.shelf.export(names, out)]
        write(machine, {"files": made}, "\n".join(made))


def _folder_add(
    path: Annotated[Path, typer.Argument(help="A folder of adapters, or another studio's own.", show_default=False)],
    machine: Machine = False,
) -> None:
    console = Console(machine)
    with guarded(console), Studio() as studio:
        folders = [str(folder) for folder in studio.shelf.add_folder(path)]
        for folder in folders:
            console.note(f"Watching {folder}")
        _scanned(studio, console, folders=folders)


def _folder_list(machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        folders = studio.shelf.folders()
        rows = [(str(one.path), "not there" if one.missing else str(one.entries), str(one.refused)) for one in folders]
        shown = table(rows, ("folder", "adapters", "refused")) if rows else "There are no folders."
        write(machine, [record(one) | {"missing": one.missing} for one in folders], shown)


def _folder_remove(
    path: Annotated[Path, typer.Argument(help="A folder of the list.", show_default=False)], machine: Machine = False
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        studio.shelf.remove_folder(path)
        write(machine, {"removed": str(path)}, f"{path} is left out; its files stay where they are.")


def _folder_refused(machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        found = studio.shelf.refused()
        lines = [f"{one.path}: {one.message} {one.hint}".rstrip() for one in found]
        write(machine, [record(one) for one in found], "\n".join(lines) or "Every file can be used.")


def _positional(name: str, kind: Any, help: str, default: Any = inspect.Parameter.empty) -> inspect.Parameter:  # noqa: ANN401 - any type expression
    annotation = Annotated[kind, typer.Argument(help=help, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _facts(values: Mapping[str, Any]) -> str:
    rows = [(key, cell(value)) for key, value in values.items() if value not in (None, "", [], {})]
    return table(rows, ("what", "value"))


def _adapters_table(entries: list[Entry]) -> str:
    rows = [
        (
            entry.name,
            entry.family,
            entry.algorithm,
            str(entry.rank),
            entry.role,
            entry.trigger,
            present.size(entry.size),
            ", ".join(entry.tags),
        )
        for entry in entries
    ]
    return table(rows, ("name", "family", "algorithm", "rank", "role", "trigger", "size", "tags"))
