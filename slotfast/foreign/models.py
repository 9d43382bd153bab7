"""Models of other projects: a factory's torch module, or a Hugging Face folder, behind the interface of ours."""

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .. import ops, shipped
from ..data import Tokenizer
from ..errors import InputError, first_line
from ..model import GPT, CausalModel
from ..stream import CachedForward
from .library import transformers_library
from .streams import OwnStream, WindowStream, transformers_stream
from .tokenizers import HuggingFaceTokenizer

_NARROW = (torch.bfloat16, torch.float16)
_PROBE_TOKENS = 16
_DEFAULT_SEQ_LEN = 1024  # of a model that does not say what it was trained on
_LONGEST_DEFAULT = 2048  # the contest's; models of long context say 131,072, which no default should run
_PADDING_ROWS = 1024  # embeddings are padded to round sizes, by fewer rows than this


class ForeignConfig(BaseModel):
    """What is known about somebody else's model."""

    model_config = ConfigDict(frozen=True)

    source: str
    architecture: str
    parameters: int
    vocab_size: int
    seq_len: int
    head_apart: bool


class LanguageModel(nn.Module):
    """A module of somebody else behind the two methods that the evaluation calls.

    Args:
        module: maps tokens int64 [B, T] to logits [B, T, V], or to what has them as `logits` or as its first element;
            where it gives the last position's alone and takes `targets`, it is called with the tokens as those.
        hidden, head: where they are apart, tokens -> hidden states [B, T, D], and hidden states -> logits.
        stream: window and sinks -> what reads a stream as `slotfast.stream.CachedForward` does; None: nothing does.
        stream_window: longest window of a stream; None where the module has no last position.
    """

    def __init__(
        self,
        module: nn.Module,
        hidden: Callable[[Tensor], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        stream: Callable[[int, int], Any] | None = None,
        stream_window: int | None = None,
    ):
        super().__init__()
        self.module, self._hidden, self._head, self.stream = module, hidden, head, stream
        self.stream_window, self._needs_targets = stream_window, False

    @property
    def head_apart(self) -> bool:
        return self._head is not None

    def hidden(
        self, tokens: Tensor, dtype: torch.dtype | None = None, first: int = 0, length: int | None = None
    ) -> Tensor:
        """Hidden states, from position `first` on, of tokens int64 [B, T]; without a head apart, logits.

        In `dtype` where that is a narrow one. The `length` of windows that are longer than T is not told to the module.
        """
        with _autocast(tokens.device, dtype):
            with _in_a_line(f"tokens int64 {list(tokens.shape)}"):
                states = (self._hidden or self._states)(tokens)
            return self._as_hidden(states, dtype)[:, first:]

    def cached_forward(self, window: int, sinks: int, dtype: torch.dtype | None, block: int = 0) -> "_Autocast":
        """What reads a stream in blocks, of so many tokens but for the last; see `slotfast.stream.CachedForward`."""
        read = self.stream or functools.partial(WindowStream, self._hidden or self._states, block=block)
        return _Autocast(self, read(window, sinks), dtype)

    def _states(self, tokens: Tensor) -> Tensor:
        """What the module gives, out of whatever holds it.

        A module of nanoGPT's kind gives the last position alone unless it has targets to compute its loss of.
        """
        if not self._needs_targets:
            states = _first(self.module(tokens))
            last_alone = isinstance(states, Tensor) and states.shape[1:2] == (1,) and tokens.size(1) > 1
            if not last_alone or "targets" not in inspect.signature(self.module.forward).parameters:
                return states
            self._needs_targets = True
        return _first(self.module(tokens, targets=tokens))

    def _as_hidden(self, states: Tensor, dtype: torch.dtype | None) -> Tensor:
        """States in a narrow `dtype`; of a model without a head apart they are logits, which are never narrow."""
        if self._hidden is None:
            return _at_least_float32(states)
        return states.to(dtype) if dtype in _NARROW else states

    def head(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of hidden states, float32 (float64 for float64) [..., V]; a bias is added last: no cap is known of."""
        if self._head is None:
            logits = hidden
        else:
            with _autocast(hidden.device, hidden.dtype):
                logits = _at_least_float32(self._head(hidden))
        return logits if bias is None else logits + bias

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses of targets [...] under hidden states [..., D]: float32 (float64 for float64) [...], nats."""
        logits = self.head(hidden).flatten(0, -2)
        return ops.cross_entropy(logits[None], targets.reshape(1, -1)).view(targets.shape)


def _first(states: Any) -> Any:
    """Logits out of an object that has them, or out of what begins with them, as nanoGPT's logits and loss do."""
    if isinstance(states, tuple | list) and not hasattr(states, "logits"):
        states = next(iter(states), states)
    return getattr(states, "logits", states)


@contextlib.contextmanager
def _in_a_line(given: str) -> Iterator[None]:
    """What somebody else's code raises, whatever it is, as InputError that says on what it fails."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"--model: fails on {given}: {first_line(error)}") from error


class _Autocast:
    """A stream whose blocks run as `LanguageModel.hidden` runs its windows."""

    def __init__(self, model: LanguageModel, stream: Any, dtype: torch.dtype | None):
        self._model, self._stream, self._dtype = model, stream, dtype

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """States, or logits, of a block; InputError where the module fails, or gives those of other positions."""
        shape = list(tokens.shape)
        with _autocast(tokens.device, self._dtype), _in_a_line(f"a stream's tokens int64 {shape}"):
            states = self._model._as_hidden(self._stream(tokens, first), self._dtype)
        if states.ndim < 3 or states.shape[:2] != (1, tokens.size(1) - first):
            found = [*states.shape[:1], states.shape[1] + first, *states.shape[2:]] if states.ndim > 1 else states.shape
            raise InputError(
                f"--model: gives {list(found)} for a stream's tokens {shape}, expected states or logits "
                f"[1, {tokens.size(1)}, ...]"
            )
        return states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Use narrow types by autocast, as we cannot know which weights of somebody else's model may be narrowed."""
    return torch.autocast(device.type, dtype, enabled=dtype in _NARROW)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class ForeignModel:
    """Somebody else's model in the place of an artifact, without a size in bytes.

    Args:
        unigram: float64 [V], how often tokens come in a text like its training text; None where nobody counted.
    """

    config: ForeignConfig
    module: LanguageModel
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unigram: Tensor | None = None

    def model(self, weights: str = "dequantized", backend: str = "auto") -> LanguageModel:
        """The model in evaluation mode; it runs as it is, so both arguments change nothing."""
        return self.module


def read_foreign(
    name: str, tokenizer_path: str | None = None, window: int | None = None
) -> tuple[ForeignModel, Tokenizer]:
    """The model that `--model` names, checked, and its tokenizer.

    Args:
        name: package.module:factory, or a folder with a Hugging Face causal language model.
        tokenizer_path: a SentencePiece model or a folder with a tokenizer of the `tokenizers` library; the model's
            own where None, or the one in this package.
        window: positions that are wanted, where that is known.

    Raises:
        InputError: nothing there, weights that are missing or not finite, a model that is not a causal language model,
            or a tokenizer of another vocabulary.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise InputError(f"--model {name}: no such folder, and not of the form package.module:factory")
    module, model = _from_folder(Path(name)) if is_folder else _from_factory(name)
    for parameter_name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"--model {name}: parameter {parameter_name!r} holds NaN or infinite values")
    longest = _declared_length(module)
    if is_folder and longest and (window or 0) > longest:  # others may mean a training length
        raise InputError(f"--seq-len {window}: the model has {longest} positions")
    seq_len = min(longest or _DEFAULT_SEQ_LEN, _LONGEST_DEFAULT)
    config = ForeignConfig(
        source=name,
        architecture=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        vocab_size=_probe(model, f"--model {name}", min(_PROBE_TOKENS, seq_len)),
        seq_len=seq_len,
        head_apart=model.head_apart,
    )
    path = Path(tokenizer_path or (name if is_folder else shipped.TOKENIZER))
    tokenizer = HuggingFaceTokenizer(path) if path.is_dir() else Tokenizer(path)
    if not 0 <= config.vocab_size - tokenizer.vocab_size < _PADDING_ROWS:
        raise InputError(
            f"{path}: {tokenizer.vocab_size} pieces; the model gives {config.vocab_size} logits: pass its own "
            "--tokenizer"
        )
    return ForeignModel(config, model), tokenizer


def _from_factory(name: str) -> tuple[nn.Module, LanguageModel]:
    """The module that package.module:factory returns, as it is and behind our interface."""
    module_name, _, factory_name = name.partition(":")
    try:
        factory = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
        module = factory()
    except Exception as error:  # whatever somebody else's code raises
        raise InputError(f"--model {name}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"--model {name}: returned {type(module).__name__}, expected a torch.nn.Module")
    module = module.eval().requires_grad_(False)
    return module, _wrapped(module)


def _wrapped(module: nn.Module) -> LanguageModel:
    """A module that belongs to no library, behind our interface."""
    apart = callable(getattr(module, "hidden", None)) and callable(getattr(module, "head", None))
    own = getattr(module, "stream", None)
    stream = (lambda window, sinks: OwnStream(own, sinks)) if callable(own) else None
    hidden, head = (module.hidden, module.head) if apart else (None, None)
    return LanguageModel(module, hidden, head, stream)


def _from_folder(folder: Path) -> tuple[nn.Module, LanguageModel]:
    """A Hugging Face causal language model of a local folder, as it is and behind our interface; runs no code of it."""
    transformers = transformers_library(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        module, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise InputError(f"{folder}: not a causal language model: {first_line(error)}") from None
    # transformers would start such weights at random, with a warning
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise InputError(f"{folder}: no weights for {absent[0]}, and {len(absent) - 1} more parameters")
    module = module.eval().requires_grad_(False)
    module.config.use_cache = False  # keys and values are for generation
    return module, _wrapped_transformers(module)


def _wrapped_transformers(module: nn.Module) -> LanguageModel:
    """A causal language model of `transformers` behind our interface."""

    def hidden(tokens: Tensor) -> Tensor:
        return module.base_model(tokens)[0]

    # Some architectures scale or cap the output matrix's product: states and head are apart only where nothing follows
    # it.
    head = module.get_output_embeddings()
    tokens = _probe_tokens(_PROBE_TOKENS).to(next(module.parameters()).device)
    with torch.inference_mode():
        try:
            logits = module(tokens).logits
            apart = head is not None and torch.allclose(head(hidden(tokens)), logits, rtol=1e-5, atol=1e-5)
        except (AttributeError, TypeError, RuntimeError):
            apart = False
    longest = _declared_length(module) or _LONGEST_DEFAULT
    stream = functools.partial(transformers_stream, module, module.base_model if apart else module, longest)
    # half: where the positions end, a window's tokens are read again from position 0, and as many must follow
    return LanguageModel(module, *((hidden, head) if apart else (None, None)), stream, max(1, longest // 2))


def language_model(module: nn.Module) -> tuple[GPT | LanguageModel, int]:
    """Any causal language model behind the interface of ours, and the tokens that it was made for.

    Args:
        module: ours, one of `transformers`, or any that gives logits of tokens; see `LanguageModel`.
    """
    if isinstance(module, GPT):
        return module, module.config.seq_len
    if not isinstance(module, LanguageModel):
        of_transformers = callable(getattr(module, "get_output_embeddings", None)) and hasattr(module, "base_model")
        module = (_wrapped_transformers if of_transformers else _wrapped)(module)
    longest = _declared_length(module.module)
    return module, min(longest or _DEFAULT_SEQ_LEN, _LONGEST_DEFAULT)


def cached_forward(
    model: CausalModel, window: int, sinks: int, dtype: torch.dtype | None, block: int = 0
) -> "CachedForward | _Autocast":
    """What reads a stream in blocks, of so many tokens but for the last; a model of another project brings its own."""
    if isinstance(model, GPT):
        return CachedForward(model, window, sinks, dtype=dtype)
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model: expected a GPT or a LanguageModel, got {type(model).__name__}")
    return model.cached_forward(window, sinks, dtype, block)


def _declared_length(module: nn.Module) -> int | None:
    """Positions that a module, or its `config`, says it was made for."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("seq_len", "max_position_embeddings", "block_size", "sequence_len"):
            if isinstance(length := getattr(owner, name, None), int) and length > 0:
                return length
    return None


def _probe_tokens(length: int) -> Tensor:
    """int64 [2, length]: two rows that differ in their last token alone; every vocabulary has tokens 0 and 1."""
    tokens = (torch.arange(length) % 2).repeat(2, 1)
    tokens[1, -1] = 1 - tokens[0, -1]
    return tokens


def _probe(model: LanguageModel, where: str, length: int) -> int:
    """Vocabulary of a model, from the logits of a few tokens; raises InputError where they are no logits."""
    try:
        with torch.inference_mode():
            logits = model.head(model.hidden(_probe_tokens(length), torch.float32))
    except InputError as error:
        raise InputError(f"{where}:{str(error).removeprefix('--model:')}") from error
    except Exception as error:  # whatever somebody else's code raises
        raise InputError(f"{where}: fails on tokens int64 [2, {length}]: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (2, length):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        last = ", of every position and not of the last alone" if shape[:2] == [2, 1] else ""
        raise InputError(f"{where}: gives {shape} for tokens [2, {length}], expected logits [2, {length}, V]{last}")
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"{where}: gives NaN or infinite logits")
    before, after = logits[:, :-1]
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        moved = float((before - after).abs().max())
        raise InputError(f"{where}: a token moves logits before it by up to {moved:.3g}: not a causal language model")
    return logits.size(-1)
