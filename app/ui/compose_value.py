"""What the canvas holds, and how it becomes a layout's concepts and comes back from them.

The board's value is `{"concepts": [...]}`, each a row as `concept_row` makes it: what a `ConceptUse` says, but its mask
as a picture in the text itself, so that the browser can show, paint and undo it without asking.
"""

from __future__ import annotations

import base64
import binascii
import io
import random
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...composition.layout import MOST_CONCEPTS, SUFFIXES, ComposeRequest, ConceptUse, read_layout
from ...pipelines.errors import InputError
from ...pipelines.picture import open_picture
from ...pipelines.requests import MAX_SEED
from . import rack
from .desk import Desk

if TYPE_CHECKING:
    from PIL import Image

    from ..library_entry import Entry

Board = dict[str, Any]
OWN = ("name", "prompt", "words", "box", "order")  # of a ConceptUse, beside those of an AdapterUse
MASK = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
MAX_MASK = 2**23  # characters of base64
MASK_SIDE = 2048  # pixels
MOST_SEEDS = 64
SEEDS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
FIRST_BOX = 0.375  # of the canvas: side of a box that was not drawn, but dropped


def empty_board() -> Board:
    """A canvas with nothing on it."""
    return {"concepts": []}


def concept_row(use: ConceptUse, entry: Entry | None, mask: str = "") -> dict[str, Any]:
    """Describe a concept as the board shows it.

    Args:
        use: What it is.
        entry: Its adapter in the library, None if it is not there.
        mask: Its mask as a picture in text.
    """
    settings = {name: getattr(use, name) for name in (*rack.SETTINGS, *OWN)}
    known = {"adapter": "", "trigger": "", "note": ""}
    if entry is not None:
        row = rack.row(entry, use)
        known = {name: row[name] for name in known}
    return {**settings, **known, "box": list(use.box) if use.box else None, "mask": mask}


def concepts_of(desk: Desk, board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the concepts as a layout wants them; masks become files under the home.

    Raises:
        InputError: A concept has no adapter, or a mask is none.
    """
    found: list[dict[str, Any]] = []
    for number, row in enumerate(cast(list[dict[str, Any]], board["concepts"]), start=1):
        if not row["adapter"]:
            name = row["name"] or f"Concept {number}"
            raise InputError(f"{name} has no adapter yet.", "Drop one on its box, or choose one on its card.")
        fields = {key: row[key] for key in ("adapter", *rack.SETTINGS, *OWN)}
        found.append({**fields, "mask": keep_mask(desk, row["mask"]) if row["mask"] else ""})
    return found


def keep_mask(desk: Desk, text: str) -> str:
    """Write a mask from the page into the uploads; gives its path.

    Raises:
        InputError: It is no picture, or too large.
    """
    mask = decoded(text)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mask.png"
        mask.save(file)
        return str(desk.studio.store_upload(file))


def decoded(text: str) -> Image.Image:
    """Read a mask from the page as a grey picture.

    Raises:
        InputError: It is no picture, or too large.
    """
    found = MASK.fullmatch(text)
    if found is None or len(text) > MAX_MASK:
        raise InputError("The page sent a mask that cannot be used.", "Clear it and paint it again.")
    try:
        raw = base64.b64decode(found[1], validate=True)
    except binascii.Error:
        raise InputError("The page sent a mask that is cut off.", "Clear it and paint it again.") from None
    return open_picture(raw, MASK_SIDE**2).convert("L")


def encoded(path: Path) -> str:
    """Give a mask's picture as text for the page.

    Raises:
        InputError: It is no picture, or cannot be read.
    """
    picture = open_picture(path).convert("L")
    picture.thumbnail((MASK_SIDE, MASK_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def opened(desk: Desk, files: Iterable[tuple[str, Path]]) -> tuple[ComposeRequest, list[str]]:
    """Read the layout among uploaded files; a mask in it is one of the other files, or one painted here before.

    Args:
        desk: Where uploads are kept.
        files: Name as the person knows it, and where it was uploaded to.

    Returns:
        The layout, and what of it could not be found.

    Raises:
        InputError: There is none, or not one only, or it cannot be read.
    """
    named = dict(files)
    layouts = [path for name, path in named.items() if is_layout(name)]
    if len(layouts) != 1:
        raise InputError("Open one layout at a time.", "With it may come the pictures that are its masks.")
    return with_own_masks(desk, read_layout(layouts[0]), named)


def with_own_masks(desk: Desk, request: ComposeRequest, named: Mapping[str, Path]) -> tuple[ComposeRequest, list[str]]:
    """Keep of a stranger's layout only masks painted here before or sent along: it must not make us read other files.

    Args:
        desk: Where uploads are kept.
        request: The layout.
        named: Pictures that came with it, by name.

    Returns:
        The layout, and what of it could not be found.
    """
    kept = desk.studio.home.uploads.resolve()
    notes: list[str] = []
    concepts: list[ConceptUse] = []
    for use in request.concepts:
        name = Path(use.mask).name
        painted = bool(use.mask) and Path(use.mask).resolve().is_relative_to(kept)
        mask = use.mask if painted else str(named.get(name, ""))
        if use.mask and not mask:
            notes.append(f"The mask of {use.called} did not come along; drop {name} together with the layout.")
        concepts.append(use.model_copy(update={"mask": mask}))
    return request.model_copy(update={"concepts": tuple(concepts)}), notes


def is_layout(name: str) -> bool:
    """Whether a file is a layout by its name."""
    return name.lower().endswith(SUFFIXES)


def board_of(desk: Desk, request: ComposeRequest) -> tuple[Board, list[str]]:
    """Show a layout's concepts; and say what of them is not there any more."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for use, entry in rack.found(desk, request.concepts):
        if entry is None:
            notes.append(f"The adapter {use.adapter} of {use.called} is not in the library.")
            use = use.model_copy(update={"name": use.called})
        mask = ""
        if use.mask:
            try:
                mask = encoded(Path(use.mask))
            except InputError:
                notes.append(f"The mask of {use.called} is not there any more.")
        rows.append(concept_row(use, entry, mask))
    return {"concepts": rows}, notes


def with_entries(board: Board, entries: Iterable[Entry], spot: Mapping[str, Any]) -> Board:
    """Give dropped adapters their concepts: the first goes where it was dropped, others get concepts of their own.

    Args:
        board: As it is.
        entries: Adapters of the library.
        spot: Where on the canvas: `index` of the concept there (-1: none), and `x`, `y` in fractions of it.
    """
    rows = [dict(row) for row in board["concepts"]]
    index = int(spot.get("index", -1))
    for entry in entries:
        if 0 <= index < len(rows):
            rows[index] |= {"adapter": entry.name, "trigger": entry.trigger, "note": rack.row(entry)["note"]}
            rows[index] |= {"blocks": {}, "prompt": rows[index]["prompt"] or entry.trigger}
        elif len(rows) < MOST_CONCEPTS:
            box = _around(float(spot.get("x", 0.5)), float(spot.get("y", 0.5)), len(rows))
            use = ConceptUse(adapter=entry.name, prompt=entry.trigger, box=box)
            rows.append(concept_row(use, entry))
        index = -1
    return {**board, "concepts": [{**row, "name": _free_name(rows, at)} for at, row in enumerate(rows)]}


def _around(x: float, y: float, count: int) -> tuple[float, float, float, float]:
    """A box about a point, inside the canvas; later ones a little aside, so that none hides another."""
    shift = 0.03 * (count % 5)
    left = min(max(x - FIRST_BOX / 2 + shift, 0), 1 - FIRST_BOX)
    top = min(max(y - FIRST_BOX / 2 + shift, 0), 1 - FIRST_BOX)
    return round(left, 4), round(top, 4), round(left + FIRST_BOX, 4), round(top + FIRST_BOX, 4)


def _free_name(rows: list[dict[str, Any]], at: int) -> str:
    """Give a concept's own name, or a numbered one where its adapter has a concept before it already."""
    row = rows[at]
    before = {other["name"] or other["adapter"] for other in rows[:at]}
    if row["name"] or not row["adapter"] or row["adapter"] not in before:
        return row["name"]
    number = next(number for number in range(2, len(rows) + 2) if f"{row['adapter']} {number}" not in before)
    return f"{row['adapter']} {number}"


def read_seeds(text: str) -> tuple[int, ...]:
    """Read "1, 2, 5-8" as seeds.

    Raises:
        InputError: It is none, or too many.
    """
    seeds: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = SEEDS.fullmatch(part)
        if found is None:
            raise InputError(f"Seeds cannot be {part!r}.", "Write numbers with commas, such as 1, 2, 5-8.")
        first = int(found[1])
        last = int(found[2] or first)
        if last < first or last - first >= MOST_SEEDS:
            raise InputError(f"Seeds cannot go from {first} to {last}.", f"At most {MOST_SEEDS}, counting up.")
        seeds += range(first, last + 1)
    if len(seeds) > MOST_SEEDS:
        raise InputError(f"These are {len(seeds)} seeds; at most {MOST_SEEDS} go into one comparison.", "Give fewer.")
    return tuple(seeds)


def written_seeds(seeds: Iterable[int]) -> str:
    """The same as text."""
    return ", ".join(str(seed) for seed in seeds)


def a_seed() -> int:
    """Draw one."""
    return random.SystemRandom().randint(0, MAX_SEED)
