"""The noise schedule as training sees it: noising, what the network shall predict, signal-to-noise ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..pipelines.errors import InputError
from .recipe import Prediction


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete-time diffusion schedule.

    Args:
        alphas: `(timesteps,)`, cumulative products; the last is 0 where the schedule has zero terminal SNR.
        kind: What the network predicts.
    """

    alphas: Tensor
    kind: Prediction

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> NoiseSchedule:  # noqa: ANN401 - any diffusers scheduler
        """Read the training schedule out of a sampler's configuration.

        Raises:
            InputError: The model is trained in a way no recipe knows, such as flow matching.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        kind = scheduler.config.get("prediction_type")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise InputError(
                f"Models that predict {kind or 'flow'} cannot be trained yet.", "Choose an SD1.5 or SDXL model."
            )
        # Samplers change their own copy (Euler avoids the zero at the end); DDPM's is the one of training.
        plain = cast(Any, DDPMScheduler.from_config(scheduler.config))
        return cls(plain.alphas_cumprod.to(device, torch.float32), kind)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) clean + sqrt(1 - a) noise; `clean`, `noise` `(batch, ...)`, `timesteps` `(batch,)` integers."""
        a = self._at(timesteps, clean)
        return a.sqrt() * clean + (1 - a).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what the network shall predict; v = sqrt(a) noise - sqrt(1 - a) clean (arXiv:2202.00512, appendix D)."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "sample":
            return clean
        a = self._at(timesteps, clean)
        return a.sqrt() * noise - (1 - a).sqrt() * clean

    def estimates(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Give the clean latents and the noise that `noisy` consists of if the network is right.

        Noise prediction has no answer where the schedule has no signal (it would divide by 0); v and sample have.
        """
        a = self._at(timesteps, noisy)
        if self.kind == "epsilon":
            return (noisy - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        if self.kind == "sample":
            return prediction, (noisy - a.sqrt() * prediction) / (1 - a).sqrt()
        return a.sqrt() * noisy - (1 - a).sqrt() * prediction, (1 - a).sqrt() * noisy + a.sqrt() * prediction

    def snr(self, timesteps: Tensor) -> Tensor:
        """Give a / (1 - a), `(batch,)`; 0 is possible, infinity is not (no schedule starts without noise)."""
        a = self.alphas[timesteps]
        return a / (1 - a)

    def _at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return self.alphas[timesteps].view(-1, *[1] * (like.ndim - 1))
