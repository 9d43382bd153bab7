"""Settings of what reads and writes files: bundle, record, artifact."""

from typing import ClassVar

from .outputs import FOLDER, JSON, JSON_OR_STDOUT, MODEL, SCRIPT, one_file, results
from .settings import Settings, model_config_setting, report_setting, setting


class BundleSettings(Settings):
    """Settings of slotfast bundle."""

    script: str | None = setting(
        None,
        "script to take the kernels into, in the place of its `from kernels import NAME`, or the same from "
        "slotfast.kernels or from a copy of that folder beside the script",
        reads=one_file,
    )
    out: str | None = setting(None, "file to write the script to", writes=SCRIPT)
    compress: bool = setting(False, "write it self-extracting: LZMA in base85")
    artifact: str | None = setting(None, "model whose bytes count with the script's", "ARTIFACT_PATH", reads=one_file)
    hub: str | None = setting(
        None, "folder to write the kernels to as the public kernels library loads them", writes=FOLDER
    )
    name: str = setting("slotfast-kernels", "name on the hub", pattern=r"^[a-z][-a-z0-9]*[a-z0-9]$")
    kernels: list[str] = setting(
        [], "kernels by name, with what they need; default: what the script imports, and all of them for --hub"
    )
    show_config: bool = setting(False, "show every setting with its source and exit")

    GROUPS: ClassVar[dict[str, str]] = {"script": "one file", "hub": "a folder of the kernel hub", "kernels": "both"}
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "--script train_gpt.py --out one.py",
        "--script train_gpt.py --out one.py --compress --artifact my.slotfast",
        "--hub folder --kernels solver",
    )


class RecordSettings(Settings):
    """Settings of slotfast record."""

    run: list[str] = setting(
        [], "results of slotfast.eval: JSON files, or folders with one", positional=True, reads=results
    )
    preset: str | None = setting(None, "the preset to report; default: the first that adapts")
    baseline: list[str] = setting([], "what to beat: runs, or MEAN,STD,N in nats a token", reads=results)
    code: str | None = setting(None, "file whose bytes count with the model's", reads=one_file)
    submission: str | None = setting(None, "write submission.json here", writes=JSON)
    report: str | None = report_setting()
    name: str | None = setting(None, "of the submission")
    author: str | None = setting(None, "of the submission")
    github_id: str | None = setting(None, "of the author")
    blurb: str | None = setting(None, "one sentence about the submission")
    allow_noncausal: bool = setting(False, "also report presets whose score has seen its own tokens")
    show_config: bool = setting(False, "show every setting with its source and exit")

    GROUPS: ClassVar[dict[str, str]] = {"run": "what is compared", "code": "submission", "allow_noncausal": "rules"}
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "run1.json run2.json run3.json",
        "run1.json run2.json run3.json --baseline 1.8822,0.0003,3",
        "ours --baseline theirs --code train_gpt.py --submission submission.json",
    )


class ShowSettings(Settings):
    """Settings of slotfast artifact show."""

    file: str = setting("", "artifact or checkpoint", positional=True, reads=one_file)
    model_config_: str | None = model_config_setting()
    json_: str | None = setting(
        None, "write the result as JSON; - for standard output", alias="json", writes=JSON_OR_STDOUT
    )

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "my.slotfast",
        "final_model.int6.ptz --model-config pr1019",
        "final_model.int6.ptz --json -",
    )


class ConvertSettings(ShowSettings):
    """Settings of slotfast artifact convert."""

    out: str = setting("", "file to write: .slotfast, or .ptz as PR #1019 has it", positional=True, writes=MODEL)

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "final_model.int6.ptz my.slotfast --model-config pr1019",
        "my.slotfast final_model.int6.ptz",
        "model.safetensors my.slotfast --model-config pr549,xsa_layers=3",
    )
