"""What happens during long work: one frozen class per event, and the token that stops it.

Work is `def run(request, token) -> Iterator[Event]`; it yields any number of events and ends with exactly one of
`Done`, `Stopped`, `Failed` (the last two are added by the job runner). Events survive JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .errors import Cancelled


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(_Event):
    """A named part of the work begins, such as "load" or "denoise"."""

    type: Literal["stage"] = "stage"
    name: str
    detail: str = ""


class Progress(_Event):
    """`step` of `total` steps of a stage are done."""

    type: Literal["progress"] = "progress"
    stage: str
    step: int
    total: int


class Preview(_Event):
    """A picture of the state after `step`, saved at `path` (a file in the job's folder, overwritten by the next)."""

    type: Literal["preview"] = "preview"
    path: str
    step: int
    label: str = ""


class Metric(_Event):
    """One number at one step: `loss`, `rate` (steps per second), `memory` (bytes)."""

    type: Literal["metric"] = "metric"
    name: str
    value: float
    step: int


class Notice(_Event):
    """Something the person should know, such as what was chosen for them."""

    type: Literal["notice"] = "notice"
    text: str


class Artifact(_Event):
    """A result that was saved: a picture, an adapter that entered the library, a report."""

    type: Literal["artifact"] = "artifact"
    kind: Literal["picture", "adapter", "model", "sample", "checkpoint", "report"]
    path: str
    label: str = ""
    step: int = 0


class Done(_Event):
    """The work ended well."""

    type: Literal["done"] = "done"
    seconds: float = 0.0


class Stopped(_Event):
    """The work was stopped by a person; `resumable` when a checkpoint was kept."""

    type: Literal["stopped"] = "stopped"
    resumable: bool = False


class Failed(_Event):
    """The work failed; `code` is an IntarsiaError's code or "bug"."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    hint: str = ""


class Interrupted(_Event):
    """The process that did the work died."""

    type: Literal["interrupted"] = "interrupted"
    resumable: bool = False


Event = Annotated[
    Stage | Progress | Preview | Metric | Notice | Artifact | Done | Stopped | Failed | Interrupted,
    Field(discriminator="type"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
FINAL = (Done, Stopped, Failed, Interrupted)


class CancelToken:
    """Carries a person's wish to stop into the work.

    Args:
        asked: Called by every check; true when somebody asked to stop (a flag, a row in the job store).
    """

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self._asked = asked
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        self._cancelled = self._cancelled or self._asked()
        return self._cancelled

    def check(self) -> None:
        """Raise `Cancelled` if a stop was asked for; call it at least once per step."""
        if self.cancelled:
            raise Cancelled
