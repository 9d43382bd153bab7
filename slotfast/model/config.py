"""What a GPT is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator


class GPTConfig(BaseModel):
    """Shape and parts of a model; the defaults are PR #1019's.

    Raises:
        pydantic.ValidationError: sizes that do not fit together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(1024, ge=2, le=65536)
    seq_len: int = Field(2048, ge=1, le=1 << 17)
    layers: int = Field(11, ge=1, le=256)
    width: int = Field(512, ge=4, le=16384)
    heads: int = Field(8, ge=1, le=256)
    kv_heads: int = Field(4, ge=1, le=256)
    mlp_width: int = Field(1536, ge=1, le=65536)
    mlp_slope: float = Field(0.5, description="slope of the leaky ReLU that is then squared")
    rope_dims: int = Field(16, ge=0, description="leading dimensions of each head that are rotated; the rest are not")
    rope_base: float = Field(10_000.0, gt=1)
    rope_length: int = Field(1024, ge=1, description="longer inputs stretch the base")
    rope_bf16: bool = Field(
        False, description="unstretched tables of frequencies rounded to bfloat16, as PR #1019's evaluation has them"
    )
    qk_gain: float = Field(1.5, description="initial gain of the normalised queries, learned per head")
    xsa_layers: int = Field(11, ge=0, description="last layers whose attention output drops its own value's direction")
    ln_scale: bool = Field(True, description="divide the normalised input of layer i by sqrt(i + 1)")
    unet: bool = Field(True, description="skips from the first half of the layers to the second, last in first out")
    smear: bool = Field(True, description="mix each embedding with the one before by a learned gate")
    bigram_buckets: int = Field(2048, ge=0, le=1 << 20, description="rows of the hashed bigram table; 0: none")
    bigram_width: int = Field(128, ge=1, le=4096)
    value_width: int = Field(128, ge=0, le=4096, description="width of the table added to the values; 0: none")
    value_layers: tuple[int, ...] = Field((9, 10), max_length=256, description="layers whose values get it")
    softcap: float | None = Field(
        30.0, gt=0, description="logits are cap * tanh(logits / cap); None, 0 in files: no cap"
    )
    tied: bool = Field(True, description="the embedding is the output matrix")
    bos_id: int | None = Field(
        None, ge=0, description="token at which smear gate and bigram hash start anew; None: they look across documents"
    )
    skip_gates: bool = Field(False, description="a learned gate per channel between each skip and the stream (#1179)")
    loops: int = Field(0, ge=0, le=16, description="how often more the layers loop_start..loop_end run (#1394, #1493)")
    loop_start: int = Field(0, ge=0)
    loop_end: int = Field(0, ge=0, description="last layer of the repeated segment")
    parallel_from: int | None = Field(
        None, ge=0, description="layers from here on add attention and MLP of one and the same input (#1412)"
    )

    @field_validator("softcap", mode="before")
    @classmethod
    def _no_cap(cls, value: Any) -> Any:
        return None if value == 0 else value

    @field_serializer("softcap")
    def _as_in_files(self, value: float | None) -> float:
        return value or 0.0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GPTConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.rope_dims % 2 or self.rope_dims > self.head_width:
            raise ValueError(f"rope_dims {self.rope_dims}: expected an even number up to {self.head_width}")
        if self.bigram_buckets == 1:
            raise ValueError("bigram_buckets 1: expected 0 or at least 2")
        layers = set(self.value_layers)
        if self.value_width and (len(layers) < len(self.value_layers) or not layers <= set(range(self.layers))):
            raise ValueError(f"value_layers {self.value_layers}: expected different layers of 0..{self.layers - 1}")
        if self.loops and not self.loop_start <= self.loop_end < self.layers:
            raise ValueError(
                f"loop {self.loop_start}..{self.loop_end}: expected layers of 0..{self.layers - 1} in order"
            )
        if self.skip_gates and not self.unet:
            raise ValueError("skip_gates without unet: there are no skips to gate")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order in which they run: the repeated segment comes loops + 1 times."""
        layers = tuple(range(self.layers))
        if not self.loops:
            return layers
        after = self.loop_end + 1
        return layers[:after] + layers[self.loop_start : after] * self.loops + layers[after:]

    @property
    def skips(self) -> int:
        return len(self.order) // 2 if self.unet else 0
