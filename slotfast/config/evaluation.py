"""Settings of what scores: eval, audit, calibrate."""

from typing import ClassVar, Literal

from pydantic import NonNegativeInt

from .outputs import (
    CALIBRATED,
    JSON,
    JSON_OR_STDOUT,
    PICTURE,
    PROGRESS,
    ROWS,
    file_or_folder,
    matching_files,
    one_file,
    shards,
)
from .settings import Settings, model_config_setting, report_setting, setting


class EvalSettings(Settings):
    """Settings of slotfast eval."""

    artifact: str | None = setting(
        None, "model to evaluate; default: the one in this package", "ARTIFACT_PATH", reads=one_file
    )
    model_config_: str | None = model_config_setting()
    model: str | None = setting(
        None, "evaluate another project's model: package.module:factory, or a Hugging Face folder", reads=file_or_folder
    )
    calibration: str | None = setting(
        None, "what `slotfast calibrate --model` found for --model, as JSON", reads=one_file
    )
    tokens: str | None = setting(None, "glob of token shards to score", reads=matching_files)
    data_path: str | None = setting(None, "folder whose fineweb_val_*.bin shards are scored", "DATA_PATH", reads=shards)
    text: str | None = setting(None, "text to score: .txt, .jsonl (key text), also .xz .gz .bz2 .zst", reads=one_file)
    tokenizer: str | None = setting(
        None,
        "SentencePiece model or Hugging Face folder; default: the model's own",
        "TOKENIZER_PATH",
        reads=file_or_folder,
    )
    preset: list[str] = setting(
        ["none", "causal", "causal-lbfgs"], "adaptations, NAME or NAME:key=value,key=value; one forward for all"
    )
    forward: Literal["auto", "windows", "stream"] = setting(
        "auto",
        "windows: each recomputed, as published; stream: every token once; auto: windows where a published preset is "
        "asked for, else what the model's calibration found",
    )
    sinks: int | None = setting(
        None, "stream: first tokens that stay visible; default: what the calibration found", ge=0, le=1 << 10
    )
    block_tokens: int | None = setting(None, "stream: tokens of one forward; default: what fits", ge=1, le=1 << 20)
    seq_len: int | None = setting(
        None, "positions of a window; default: the training length", "EVAL_SEQ_LEN", ge=1, le=1 << 17
    )
    stride: int = setting(64, "new positions of each window", "EVAL_STRIDE", ge=1)
    batch_windows: int | None = setting(
        None, "windows of one forward; default: what fits", "EVAL_BATCH_SEQS", ge=1, le=1 << 16
    )
    max_tokens: int | None = setting(None, "score only the start of the stream", "EVAL_MAX_TOKENS", ge=2)
    adapt_windows: int | None = setting(
        None, "windows that are adapted at once, a multiple of --batch-windows; default: what fits", ge=1, le=1 << 20
    )
    ttt: bool = setting(
        False, "add the row ttt-549, with the numbers below, and ttt-549+ROW for every other row", "TTT_ENABLED"
    )
    ttt_chunk: int = setting(32768, "tokens of a chunk", "TTT_CHUNK_TOKENS", ge=1)
    ttt_lr: float = setting(0.002, "SGD's rate on the first chunk; a cosine takes it to 0", "TTT_LR", gt=0)
    ttt_epochs: int = setting(3, "over each chunk", "TTT_EPOCHS", ge=1, le=1000)
    ttt_batch: int = setting(32, "sequences of one step on each rank", "TTT_BATCH_SEQS", ge=1)
    ttt_momentum: float = setting(0.9, "of SGD", "TTT_MOMENTUM", ge=0, lt=1)
    ttt_clip: float = setting(1.0, "bound on the gradient's norm", "TTT_GRAD_CLIP", gt=0)
    weights: Literal["dequantized", "int6"] = setting(
        "dequantized", "int6: the blocks' linear layers run on packed 6-bit weights"
    )
    backend: Literal["auto", "triton", "torch"] = setting("auto", "auto: triton on a GPU, torch on a CPU")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "of the forward; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    compile: Literal["auto", "off", "on", "graphs"] = setting(
        "auto",
        "the forward by torch.compile; graphs: and CUDA graphs; auto: on for a GPU's runs of 1,000 forwards and more",
    )
    budget: float | None = setting(None, "seconds that the evaluation may take: adds a verdict", gt=0)
    allow_noncausal: bool = setting(False, "also run presets whose score has seen its own tokens")
    json_: str | None = setting(
        None, "write the result as JSON; - for standard output", alias="json", writes=JSON_OR_STDOUT
    )
    per_token: str | None = setting(None, "write every scored token as .npz", writes=ROWS)
    resume: str | None = setting(
        None, "save progress there every few seconds, and go on from it: the result has the same bits", writes=PROGRESS
    )
    plot: str | None = setting(
        None,
        "draw bpb along the stream and the gain of each document as PNG; needs matplotlib: '.[plot]'",
        writes=PICTURE,
    )
    report: str | None = report_setting()
    list_presets: bool = setting(False, "list the presets and exit")
    show_preset: str | None = setting(None, "show one preset and why it is, or is not, causal, and exit")
    show_config: bool = setting(False, "show every setting with its source and exit")

    GROUPS: ClassVar[dict[str, str]] = {
        "artifact": "what is scored",
        "preset": "adaptation",
        "forward": "forward",
        "ttt": "test-time training",
        "weights": "where and how it runs",
        "json_": "output",
        "list_presets": "presets",
    }
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "--text mine.txt --preset none causal",
        "--artifact my.slotfast --tokenizer my.model --tokens 'data/fineweb_val_*.bin' --json result.json",
        "--model path/to/folder --text mine.txt      # of Hugging Face",
    )
    CHANGES_ROWS: ClassVar[bool] = True


class AuditSettings(Settings):
    """Settings of slotfast audit."""

    score: str | None = setting(None, "loop to audit, package.module:function; default: our own, with --preset")
    preset: list[str] = setting(
        ["none", "causal", "causal-lbfgs"],
        "our rows to audit, NAME or NAME:key=value,key=value; all: every preset, which takes some minutes",
    )
    artifact: str | None = setting(
        None, "model of our own loop; default: the one in this package", "ARTIFACT_PATH", reads=one_file
    )
    model_config_: str | None = model_config_setting()
    tokens: str | None = setting(None, "glob of token shards; a short piece of them is used", reads=matching_files)
    text: str | None = setting(
        None, "text: .txt, .jsonl (key text), also .xz .gz .bz2 .zst; a piece of it is used", reads=one_file
    )
    tokenizer: str | None = setting(
        None, "SentencePiece model, whose bytes are the rule", "TOKENIZER_PATH", reads=one_file
    )
    vocab_size: int | None = setting(
        None, "tokens of the vocabulary, for --score without --tokenizer", ge=2, le=1 << 20
    )
    byte_rule: str | None = setting(
        None, "package.module:function for --score without --tokenizer: bytes of every token of a stream, [N] -> [N]"
    )
    bos_id: int | None = setting(None, "token that starts a document, for --score without --tokenizer", ge=0)
    seq_len: int | None = setting(None, "positions of a window; ours: 64", ge=1, le=1 << 17)
    stride: int | None = setting(None, "new positions of each window; ours: 8", ge=1)
    batch_windows: int | None = setting(None, "windows of one batch; ours: 8", ge=1, le=1 << 16)
    forward: Literal["windows", "stream"] = setting("windows", "of our own loop: windows, or every token once")
    sinks: int = setting(0, "of our own loop in a stream: first tokens that stay visible", ge=0, le=1 << 10)
    ranks: int | None = setting(None, "ranks that the loop runs, one after the other; ours: 2", ge=1, le=1 << 10)
    max_tokens: int | None = setting(None, "tokens of a stream; default: two batches of every rank", ge=3)
    seed: list[NonNegativeInt] = setting([0], "of the altered streams; a round of everything for each")
    reruns: int | None = setting(
        None, "runs of a round, about; default: 48, or 32 of our own loop within 20 s a row", ge=1
    )
    budget: float | None = setting(None, "seconds for the runs instead, about", gt=0)
    backend: Literal["auto", "triton", "torch"] = setting("auto", "of our own loop; auto: triton on a GPU")
    device: str = setting("auto", "of our own loop: auto, cpu, cuda, cuda:1, ...")
    compile: Literal["off", "on"] = setting("off", "of our own loop: its forward by torch.compile")
    json_: str | None = setting(
        None, "write the result as JSON; - for standard output", alias="json", writes=JSON_OR_STDOUT
    )
    fresh_process: bool = setting(False, "also run --score in processes of its own, where it has nothing to remember")
    certificate: str | None = setting(
        None, "write what was covered, of what, and how to repeat it, as JSON", writes=JSON
    )
    report: str | None = report_setting()
    traceback: bool = setting(False, "show where a loop failed")
    show_config: bool = setting(False, "show every setting with its source and exit")

    GROUPS: ClassVar[dict[str, str]] = {
        "score": "what is audited",
        "tokens": "the stream",
        "seq_len": "how the loop runs",
        "seed": "how long it is looked at",
        "backend": "where and how our own loop runs",
        "json_": "output",
    }
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "--preset all",
        "--score package.module:function --vocab-size 1024 --certificate audit.json",
        "--score package.module:function --tokenizer my.model --text mine.txt --fresh-process",
    )
    CHANGES_ROWS: ClassVar[bool] = True


class CalibrateSettings(Settings):
    """Settings of slotfast calibrate."""

    artifact: str | None = setting(None, "model to calibrate", "ARTIFACT_PATH", reads=one_file)
    model: str | None = setting(
        None, "or another project's model: package.module:factory, or a Hugging Face folder", reads=file_or_folder
    )
    tokenizer: str | None = setting(
        None,
        "its SentencePiece model, or Hugging Face folder; default: that in the folder of --model",
        "TOKENIZER_PATH",
        reads=file_or_folder,
    )
    text: str | None = setting(
        None,
        "documents held out from its training; never what is to be scored. With --model, of text like its training "
        "text: tokens are counted in three of four documents, and the fourth is held out from that",
        reads=one_file,
    )
    max_tokens: int | None = setting(100_000, "calibrate on so many tokens at most", ge=2)
    seq_len: int | None = setting(None, "positions of a window; default: the training length", ge=1, le=1 << 17)
    stride: int | None = setting(None, "new positions of each window; default: 64", ge=1)
    forward: Literal["auto", "windows", "stream"] = setting(
        "auto", "what is calibrated; auto: finds the better one, which takes a forward of every window"
    )
    learn_trials: int = setting(
        0, "choose the numbers of `learn` too, by so many passes that learn at most; 0: they stay uncalibrated", ge=0
    )
    learn_row: Literal["learn", "learn+causal"] = setting(
        "learn", "row that these numbers are to serve: what learns best alone may add little below counts"
    )
    device: str = setting("cpu", "auto, cpu, cuda, cuda:1, ...")
    out: str | None = setting(
        None, "what to write: the artifact with its calibration, or that of --model as JSON", writes=CALIBRATED
    )
    show_config: bool = setting(False, "show every setting with its source and exit")

    GROUPS: ClassVar[dict[str, str]] = {"artifact": "model and text", "seq_len": "how it runs", "out": "output"}
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "--artifact my.slotfast --tokenizer my.model --text held-out.jsonl --out calibrated.slotfast",
        "--model path/to/folder --text like-its-training.jsonl --forward stream --seq-len 1024 --out its.json",
        "--artifact my.slotfast --show-config",
    )
