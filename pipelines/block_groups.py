"""The parts of a model an adapter changes, grouped as a person turns them up and down: text encoders, down, mid, up.

Told from the file's header alone, without torch. A group is one or several starts of layer paths, as
`AdapterUse.blocks` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .headers import read_header
from .identify import HALVES, choose_family, yardstick
from .layers import collect

STACK = 6  # groups at most that a stack of equal blocks is cut into
STACKS = {
    "transformer_blocks": "blocks",
    "single_transformer_blocks": "single blocks",
    "blocks": "blocks",
}
OTHER = "other layers"


@dataclass(frozen=True)
class BlockGroup:
    """A part of a model that one slider is for.

    Args:
        title: For people.
        starts: How the paths of its layers start, such as `unet.up_blocks.0`.
        layers: How many of the adapter's layers lie in it.
        inside: Title of the group it is a part of, "" if of none.
    """

    title: str
    starts: tuple[str, ...]
    layers: int
    inside: str = ""

    def holds(self, path: str) -> bool:
        """Whether a layer lies in it."""
        return any(path == start or path.startswith(f"{start}.") for start in self.starts)


def groups_of_file(path: Path) -> tuple[BlockGroup, ...]:
    """Read a file's header and group its layers.

    Raises:
        AdapterError: It is no sound safetensors file, or holds a layer twice.
    """
    header = read_header(path)
    choice = choose_family(header, None)
    found = collect(header, yardstick(choice.yardstick), plain=True)
    return block_groups(found.layers, choice.family)


def block_groups(paths: Iterable[str], family: str) -> tuple[BlockGroup, ...]:
    """Group layers by where they sit.

    An SDXL adapter also gets B-LoRA's two blocks: "content" and "style", inside the first up block, or in its place
    where nothing else is in it.

    Args:
        paths: Canonical paths of the adapter's layers.
        family: Of the adapter.
    """
    known = sorted(paths)
    depth = _depth(known)
    starts: dict[tuple[tuple[int, int], str], dict[str, int]] = {}
    for path in known:
        start, order, title = _place(path, depth)
        counts = starts.setdefault((order, title), {})
        counts[start] = counts.get(start, 0) + 1
    groups: list[BlockGroup] = []
    for (_, title), counts in sorted(starts.items()):
        group = BlockGroup(title, tuple(sorted(counts, key=_natural)), sum(counts.values()))
        parts = _halves(known, group) if family == "sdxl" and group.starts == ("unet.up_blocks.0",) else ()
        whole = sum(part.layers for part in parts) == group.layers
        groups += parts if whole else (group, *parts)
    return tuple(groups)


def _halves(paths: list[str], parent: BlockGroup) -> tuple[BlockGroup, ...]:
    """The content and style blocks inside the first up block; without it around them where nothing else is in it."""
    counts = {start: sum(path.startswith(start) for path in paths) for start in HALVES.values()}
    outside = "" if sum(counts.values()) == parent.layers else parent.title
    return tuple(
        BlockGroup(role, (start.rstrip("."),), counts[start], outside)
        for role, start in HALVES.items()
        if counts[start]
    )


def _depth(paths: list[str]) -> dict[str, int]:
    """Number of blocks in each stack of equal ones, as far as the adapter reaches."""
    depth: dict[str, int] = {}
    for path in paths:
        parts = path.split(".")
        if parts[1] in STACKS and parts[2].isdecimal():
            depth[parts[1]] = max(depth.get(parts[1], 0), int(parts[2]) + 1)
    return depth


def _place(path: str, depth: dict[str, int]) -> tuple[str, tuple[int, int], str]:
    """Give the start of a path that stands for its block, the block's place among all, and its title."""
    parts = path.split(".")
    component, block = parts[0], parts[1]
    if component.startswith("text_encoder"):
        return component, (0, 0), component.replace("_", " ")
    if block in ("down_blocks", "up_blocks"):
        number = int(parts[2])
        return ".".join(parts[:3]), (1 if block == "down_blocks" else 3, number), f"{block.split('_')[0]} {number}"
    if block == "mid_block":
        return ".".join(parts[:2]), (2, 0), "mid"
    if block in depth:
        size = -(-depth[block] // STACK)
        number = int(parts[2]) // size
        first, last = number * size, min((number + 1) * size, depth[block]) - 1
        span = f"{first}" if first == last else f"{first} to {last}"
        return ".".join(parts[:3]), (4 + list(STACKS).index(block), number), f"{STACKS[block]} {span}"
    return ".".join(parts[:2]), (9, 0), OTHER


def _natural(start: str) -> tuple[str, int]:
    head, _, tail = start.rpartition(".")
    return (head, int(tail)) if tail.isdecimal() else (start, 0)
