"""Every kind of request that can become a job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..composition.layout import ComposeRequest
from ..pipelines.requests import EffectRequest, GenerateRequest, ToolRequest, TrainRequest

AnyRequest = GenerateRequest | TrainRequest | ToolRequest | EffectRequest | ComposeRequest
Request = Annotated[AnyRequest, Field(discriminator="kind")]
