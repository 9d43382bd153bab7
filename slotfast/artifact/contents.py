"""What an artifact holds, whatever file it came from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import pack_int6
from ..model import GPT, GPTConfig, PackedLinear
from ..ops import Backend
from ..quantize import QuantizedMatrix, quantize_rows, stored_bits

# A trained model compresses by a factor of two, one of ternary weights by five, an all-zero one without limit: more
# than this is held to be a bomb. The slack is for files of a few bytes.
_MAX_EXPANSION = 8
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """A model as it is stored.

    Args:
        config: the model's shape.
        tensors: by parameter name; quantised matrices, the rest float32.
        metadata: JSON-able facts: tokenizer hash, how it was trained, calibration.
        unigram: float32 [V], training frequency of each token, or None where the file has none.
    """

    config: GPTConfig
    tensors: Mapping[str, QuantizedMatrix | Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unigram: Tensor | None = None

    @classmethod
    def from_model(cls, model: GPT, metadata: Mapping[str, Any], unigram: Tensor | None = None) -> "Artifact":
        """Quantise a model: matrices of the blocks to 6 bits, embeddings to 8, the rest to float16."""
        return cls(model.config, model.state_dict(), dict(metadata), unigram).quantized()

    def quantized(self) -> "Artifact":
        """The same with all remaining matrices rounded: those of the blocks to 6 bits, embeddings to 8."""
        tensors: dict[str, QuantizedMatrix | Tensor] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, QuantizedMatrix):
                tensors[name] = tensor
            elif (bits := stored_bits(name, tensor)) == 16:
                tensors[name] = tensor.detach().half().float()
            else:
                tensors[name] = quantize_rows(tensor, bits)
        return Artifact(self.config, tensors, self.metadata, self.unigram)

    def model(self, weights: Literal["dequantized", "int6"] = "dequantized", backend: Backend = "auto") -> GPT:
        """The model in evaluation mode.

        Args:
            weights: `dequantized` gives float32 matrices; `int6` keeps those of 6 bits packed, for the int6 kernel.
            backend: of its blocks and of packed layers.

        Raises:
            InputError: `int6` of an artifact without a matrix of 6 bits.
        """
        with torch.device("meta"):  # initialising 27 million weights takes longer than reading them
            model = GPT(self.config)
        model.backend = backend
        state = {
            name: tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else tensor.clone()
            for name, tensor in self.tensors.items()
        }
        model.load_state_dict(state, assign=True)
        if weights == "int6":
            packed = 0
            for name, tensor in self.tensors.items():
                layer = name.removesuffix(".weight")
                if not isinstance(tensor, QuantizedMatrix) or tensor.bits != 6 or layer == name:
                    continue
                if isinstance(model.get_submodule(layer), nn.Linear):
                    model.set_submodule(layer, PackedLinear(pack_int6(tensor.codes, tensor.scale), backend))
                    packed += 1
            if not packed:
                raise InputError("weights int6: the model's file holds no linear layer of 6 bits")
        return model.eval().requires_grad_(False)


class CalibratedRates(BaseModel):
    """What `slotfast.calibrate` stored; anything else in it is kept and shown."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    scale: float = Field(ge=0, le=2)
    decay: float = Field(gt=0, le=1)
    gates: tuple[tuple[Annotated[float, Field(ge=-100, le=100)], Annotated[float, Field(ge=-100, le=100)]], ...] = (
        Field(min_length=6, max_length=6)
    )


class Metadata(BaseModel):
    """The part of an artifact's metadata that is acted on; anything else is kept and shown."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    tokenizer_sha256: str | None = None
    calibration: CalibratedRates | None = None


def expansion_limit(size: int) -> int:
    """Bytes, or weights, that `size` bytes of a file may expand to."""
    return _SLACK_BYTES + _MAX_EXPANSION * size


def parameter_shapes(config: GPTConfig, limit: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's parameters; raises InputError where they come to more than `limit` weights."""
    with torch.device("meta"):  # shapes only: nothing is allocated
        shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    needed = sum(math.prod(shape) for shape in shapes.values())
    if needed > limit:
        raise InputError(f"its model has {needed} parameters, too many for a file of this size")
    return shapes
