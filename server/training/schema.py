"""The body that creates a job: OpenAI's fields, and ``nybble`` with more options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.api.body import Body

_AUTO = Literal["auto"]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class Hyperparameters(Body):
    """OpenAI's hyperparameters.

    batch_size: examples in a step.
    learning_rate_multiplier: factor on the default learning rate.
    """

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | _AUTO | None = None
    batch_size: Annotated[int, Field(ge=1, le=256)] | _AUTO | None = None
    learning_rate_multiplier: _Positive | _AUTO | None = None


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    refused: ClassVar = {
        "dpo": "dpo is not supported, only supervised",
        "reinforcement": "reinforcement is not supported, only supervised",
    }

    type: Literal["supervised"]
    supervised: Supervised | None = None


class Options(Body):
    """Options of ``nybble finetune``, with the same names and defaults.

    Packing and patience are missing: packing would change the requested batch size, and patience
    would end a run early.
    """

    rank: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: _Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    learning_rate: _Positive = 5e-5
    lora_plus: _Positive = 16.0
    max_steps: Annotated[int, Field(ge=0)] = 0
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = False
    eval_every: _Count | None = None
    patience: Annotated[int, Field(ge=0)] = 0


class CreateJob(Body):
    refused: ClassVar = {"integrations": "integrations are not supported"}

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    nybble: Options = Options()

    @model_validator(mode="after")
    def _hyperparameters_once(self) -> CreateJob:
        if self.hyperparameters is not None and self.method is not None and self.method.supervised:
            raise PydanticCustomError(
                "invalid_value",
                "hyperparameters are given twice: leave them to method",
                {"param": "hyperparameters"},
            )
        return self

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, wherever they were given."""
        nested = None
        if self.method is not None and self.method.supervised is not None:
            nested = self.method.supervised.hyperparameters
        return nested or self.hyperparameters or Hyperparameters()

    def kept(self) -> dict[str, Any]:
        """The body without null fields, as it is stored."""
        return self.model_dump(mode="json", exclude_none=True)
