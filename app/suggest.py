"""Finds the adapters of the library that a prompt asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pipelines.errors import InputError
from ..pipelines.events import CancelToken

if TYPE_CHECKING:
    from ..composition.retrieval import Found
    from .library_entry import Entry
    from .shelf import Shelf


def suggest(shelf: Shelf, prompt: str, model: str, count: int) -> tuple[Found, ...]:
    """Rank the adapters of a model's family by how near their words are to a prompt's, as the model reads both.

    Raises:
        IntarsiaError: The model cannot be loaded, or the prompt is empty.
    """
    from ..composition.retrieval import Candidate, retrieve
    from ..pipelines.models import Resident

    if not prompt.strip():
        raise InputError("The prompt is empty.", "Say what the picture shows.")
    resident = Resident()
    try:
        found = resident.get(model, offload=None)
        entries = [entry for entry in shelf.entries() if entry.family == found.family]
        candidates = [Candidate(entry.name, words(entry)) for entry in entries]
        return retrieve(found, prompt, candidates, count, CancelToken())
    finally:
        resident.free()


def words(entry: Entry) -> tuple[str, ...]:
    """What is known of an adapter in words: its triggers, name, title, tags, and a person's note."""
    names = (name.replace("-", " ").replace("_", " ") for name in (entry.name, entry.title))
    told = (entry.trigger, *entry.triggers, *names, *entry.tags, entry.notes)
    return tuple(dict.fromkeys(text.strip() for text in told if text.strip()))
