"""The denoiser with everything but latents and timestep filled in, for one picture or several in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from .families import Family


class Network:
    """The denoiser with everything but latents and timestep filled in.

    Args:
        family: Decides the names of the denoiser's inputs.
        components: A modular pipeline.
        state: After the prepare blocks.
        guidance: Scale; used where there are two branches.
        guided: Put the unconditional branch in front of the conditional one, in one batch.
    """

    def __init__(self, family: Family, components: Any, state: Any, guidance: float, guided: bool) -> None:  # noqa: ANN401
        self._denoiser = getattr(components, family.denoiser)
        self._scheduler = components.scheduler
        self._dtype: torch.dtype = state.get("prompt_embeds").dtype
        self._guidance = guidance
        self._guided = guided
        self._flux = family.name == "flux1"
        self._transformer = family.denoiser == "transformer"
        self._fixed = self._inputs(family, state)

    def _inputs(self, family: Family, state: Any) -> dict[str, Any]:  # noqa: ANN401
        """The denoiser's other inputs; the branches are joined here, once, not in every step."""
        fixed: dict[str, Any] = {"encoder_hidden_states": self._both(state, "prompt_embeds")}
        if family.name == "sdxl":
            fixed["added_cond_kwargs"] = {
                "text_embeds": self._both(state, "pooled_prompt_embeds"),
                "time_ids": self._both(state, "add_time_ids"),
            }
            fixed["timestep_cond"] = state.get("timestep_cond")
        if family.denoiser == "transformer":
            fixed["pooled_projections"] = self._both(state, "pooled_prompt_embeds")
        if family.name == "flux1":
            fixed |= {"txt_ids": state.get("txt_ids"), "img_ids": state.get("img_ids")}
            fixed["guidance"] = state.get("guidance")
        return fixed

    def _both(self, state: Any, name: str) -> Tensor:  # noqa: ANN401
        conditional: Tensor = state.get(name)
        return torch.cat([state.get(f"negative_{name}"), conditional]) if self._guided else conditional

    @classmethod
    def together(cls, networks: Sequence[Network]) -> Network:
        """One network for the pictures of several: all unconditional branches in front of all conditional ones."""
        made = copy(networks[0])
        made._fixed = _together([network._fixed for network in networks], 2 if made._guided else 1)
        return made

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self._guided

    @property
    def text(self) -> Tensor:
        """What the cross- or joint attention reads: `(branches * pictures, tokens, width)`."""
        return self._fixed["encoder_hidden_states"]

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predict, guided.

        Args:
            latents: Float32, one entry per picture; the sampler's own scale.
            timestep: 0-d.

        Returns:
            Float32, the shape of `latents`.
        """
        return self.guide(*self.halves(latents, timestep))

    def halves(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor | None, Tensor]:
        """Predict without and with the prompt; the first is None where there is no guidance."""
        if not self._guided:
            return None, self._run(latents, timestep, self._fixed)
        unconditional, conditional = self._run(torch.cat([latents, latents]), timestep, self._fixed).chunk(2)
        return unconditional, conditional

    def conditional(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predict with the prompt alone; may be differentiated."""
        return self._run(latents, timestep, _second_half(self._fixed) if self._guided else self._fixed)

    def guide(self, unconditional: Tensor | None, conditional: Tensor) -> Tensor:
        """Put the two halves together."""
        if unconditional is None:
            return conditional
        return unconditional + self._guidance * (conditional - unconditional)

    def _run(self, x: Tensor, timestep: Tensor, fixed: dict[str, Any]) -> Tensor:
        if self._transformer:
            clock = timestep.expand(x.shape[0])
            inputs = {"hidden_states": x.to(self._dtype), "timestep": clock / 1000 if self._flux else clock}
        else:
            x = self._scheduler.scale_model_input(x, timestep)
            inputs = {"sample": x.to(self._dtype), "timestep": timestep}
        return self._denoiser(**inputs, **fixed, return_dict=False)[0].float()


def _together(values: Sequence[Any], branches: int) -> Any:  # noqa: ANN401 - tensors, dictionaries of them, or None
    first = values[0]
    if isinstance(first, dict):
        return {key: _together([value[key] for value in values], branches) for key in first}
    if first is None or first.ndim < 2 or first.shape[0] % branches or first.shape[0] > branches:
        return first  # the same for every picture: positions, a guidance
    return torch.cat([value[branch : branch + 1] for branch in range(branches) for value in values])


def _second_half(value: Any) -> Any:  # noqa: ANN401 - tensors, dictionaries of them, or None
    """The conditional branch of a guided network's inputs, all of which have both branches in one batch."""
    if isinstance(value, dict):
        return {key: _second_half(part) for key, part in value.items()}
    return value if value is None else value.chunk(2)[1]
