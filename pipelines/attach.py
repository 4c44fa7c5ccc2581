"""Hang adapters on a model and take them off again, leaving no trace.

A branch adds to the output of its layer through a forward hook: `weight * scale * up(down(x))` for low-rank factors,
the layer's own operation with the changed weight's difference for every other kind. No weight is touched, so detaching
restores the model exactly, and what the adapters do can change between two steps: which are active, which sample of a
batch has which, where each acts, or how their parts are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import AdapterError
from .fitted import Attachment, Target, check_weights, fitted, shaped
from .site import Gain, Rows, Site

__all__ = ["Attachment", "Branches", "Gain", "Target", "attached", "fitted"]

Gains = Callable[[str, Tensor], Mapping[str, Gain]]
Fuse = Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


class Branches:
    """The adapters that hang on a model: which act, where, and how strongly.

    Args:
        sites: Every touched layer.
        weights: Weight by adapter name.
        matched: As in `Fitted`.
    """

    def __init__(self, sites: Sequence[Site], weights: Mapping[str, float], matched: Mapping[str, str]) -> None:
        self._sites = sites
        self._weights = dict(weights)
        self._active = frozenset(weights)
        self._muted: frozenset[str] = frozenset()
        self._strengths = dict(weights)
        self._assigned: tuple[frozenset[str], ...] = ()
        self._rows: Rows = ()
        self._gains: Gains | None = None
        self._fuse: Fuse | None = None
        self.matched = MappingProxyType(dict(matched))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def paths(self) -> Mapping[str, tuple[str, ...]]:
        """Canonical path of every touched layer, with the adapters that change it."""
        return MappingProxyType({site.path: tuple(site.branches) for site in self._sites})

    @property
    def active(self) -> frozenset[str]:
        return self._active - self._muted

    def activate(self, names: Iterable[str]) -> None:
        """Let only these adapters act, at their weights, everywhere."""
        self._plan(names)

    def assign(self, rows: Sequence[Iterable[str]]) -> None:
        """Let each sample of a batch have adapters of its own, at their weights.

        Args:
            rows: Names for each; sample i has those of row i modulo the number of rows.
        """
        assigned = tuple(frozenset(row) for row in rows)
        self._plan(frozenset[str]().union(*assigned), assigned=assigned)

    def spread(self, gains: Gains) -> None:
        """Let each adapter act as strongly as `gains(path, output)` says for the layer at hand.

        Args:
            gains: Given a layer's canonical path and output, gives for the adapters that act there a number, or a
                tensor that broadcasts to `(batch, tokens, 1)`, `(batch, 1, height, width)`: a factor of the weight.
        """
        self._plan(self._weights, gains=gains)

    def combine(self, fuse: Fuse) -> None:
        """Put what the adapters would add together in a way of one's own.

        Args:
            fuse: Given a layer's canonical path, its output and what each active adapter would add, gives the layer's
                new output.
        """
        self._plan(self._weights, fuse=fuse)

    def mute(self, names: Iterable[str]) -> None:
        """Keep these adapters from acting, whatever is planned, until other names are given."""
        self._muted = frozenset(names)
        self._refresh()

    @property
    def weights(self) -> Mapping[str, float]:
        return MappingProxyType(self._weights)

    @weights.setter
    def weights(self, values: Mapping[str, float]) -> None:
        """Set the weights of some adapters; the others keep theirs."""
        self._known(values)
        check_weights(values)
        self._weights.update(values)
        self._refresh()

    def hook(self, site: Site, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the branches of one layer to its output."""
        x = args[0]
        if self._fuse is not None:
            return self._fuse(site.path, output, site.parts(output, x, self._strengths))
        if self._gains is not None:
            return site.add_gained(output, x, self._strengths, self._gains(site.path, output))
        if self._rows:
            return site.add_rows(output, x, self._rows)
        return site.add(output, x, self._strengths)

    def _plan(
        self,
        names: Iterable[str],
        assigned: tuple[frozenset[str], ...] = (),
        gains: Gains | None = None,
        fuse: Fuse | None = None,
    ) -> None:
        wanted = frozenset(names)
        self._known(wanted)
        self._active, self._gains, self._fuse = wanted, gains, fuse
        changed = assigned != self._assigned
        self._assigned = assigned
        self._refresh(changed)

    def _known(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self._weights))
        if unknown:
            raise AdapterError(f"No adapter called {unknown[0]} is attached.", f"Attached: {', '.join(self.names)}.")

    def _refresh(self, rows: bool = False) -> None:
        strengths = {name: weight for name, weight in self._weights.items() if name in self.active}
        if strengths != self._strengths or rows:
            self._strengths = strengths
            self._rows = tuple({name: strengths[name] for name in row if name in strengths} for row in self._assigned)
            for site in self._sites:
                site.reset()


@contextmanager
def attached(components: Mapping[str, nn.Module], attachments: Sequence[Attachment]) -> Generator[Branches]:
    """Hang adapters on a model for the length of a `with` block.

    Every layer must exist and every shape must fit before anything is touched; on leaving, also by an exception, no
    hook is left.

    Args:
        components: The model's parts by name: `unet`, `text_encoder`, `text_encoder_2`.
        attachments: The adapters; names must differ. None is fine.

    Raises:
        AdapterError: An adapter does not fit (with counts and the first three names), or two share a name.
    """
    found = fitted(components, attachments)
    sites: list[Site] = []
    for module, uses in found.layers:
        sites.append(Site(module, uses[0][1]))
        for attachment, path in uses:
            layer = shaped(attachment.adapter.layers[path], module)
            sites[-1].branches[attachment.name] = layer, attachment.factor(path)
    weights = {attachment.name: attachment.weight for attachment in attachments}
    branches = Branches(tuple(sites), weights, found.matched)
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(_hook(branches, site)))
        yield branches
    finally:
        for handle in handles:
            handle.remove()


def _hook(branches: Branches, site: Site):  # noqa: ANN202 - torch's own hook type is a bare callable
    def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return branches.hook(site, args, output)

    return run
