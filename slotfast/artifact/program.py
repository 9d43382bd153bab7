"""The commands: what an artifact holds, and one written in another form; each gives its result and its text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import config
from ..errors import InputError
from ..quantize import QuantizedMatrix
from .architecture import parse_overrides
from .bounded import printable
from .codecs import order0_bytes
from .community import decode_community, write_community
from .format import read_entries, write_artifact
from .load import is_ours, load_artifact


def show(settings: config.ShowSettings) -> tuple[dict[str, Any], str]:
    overrides = parse_overrides(settings.model_config_)
    if is_ours(settings.file):
        artifact = load_artifact(settings.file, overrides)
        about: dict[str, Any] = {"config": artifact.config.model_dump(), "metadata": dict(artifact.metadata)}
        about["calibrated"] = artifact.metadata.get("calibration") is not None
        about["frequencies"] = artifact.unigram is not None
        tensors, stored = artifact.tensors, {entry.name: entry for entry in read_entries(settings.file)}
    else:
        about, tensors, stored = *_show_community(settings.file, overrides), {}
    rows: list[dict[str, Any]] = []
    for name, tensor in tensors.items():
        parts = [stored[part] for part in (name, f"{name}.scale") if part in stored]
        codes = tensor.codes if isinstance(tensor, QuantizedMatrix) else tensor
        rows.append(
            {
                "name": name,
                "shape": list(codes.shape),
                "type": f"int{tensor.bits}" if isinstance(tensor, QuantizedMatrix) else "float",
                "codec": parts[0].codec if parts else None,
                "bytes": sum(part.bytes for part in parts) if parts else None,
                "weights": codes.numel(),
                "order0_bytes": _order0_bytes(tensor),
            }
        )
    found = {
        "schema": 1,
        "file": settings.file,
        "bytes": Path(settings.file).stat().st_size,
        "weights": sum(row["weights"] for row in rows),
        **about,
        "tensors": rows,
    }
    return found, _table(found)


def _show_community(
    file: str, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Tensor | QuantizedMatrix]]:
    """What can be said about somebody else's file, and all its tensors, even those that this model has no place for."""
    decoded = decode_community(file)
    description = decoded.describe(overrides)
    if not description.unsaid and not description.lacks:
        decoded.artifact(overrides)  # complete, so it must be sound
    about = {
        "config": description.known,
        "metadata": decoded.metadata(description, overrides),
        "calibrated": False,
        "frequencies": False,
        "unsaid": list(description.unsaid),
        "generations": description.likely,
        "missing_parts": description.missing_parts(""),
    }
    return about, decoded.tensors


def _order0_bytes(tensor: Tensor | QuantizedMatrix) -> float | None:
    """For a matrix's codes, plus its scales as they are."""
    if not isinstance(tensor, QuantizedMatrix):
        return None
    return order0_bytes(tensor.codes.numpy()) + 2 * len(tensor.scale)


def _table(found: dict[str, Any]) -> str:
    lines = [f"{'tensor':<34}{'shape':>14}{'type':>7}{'codec':>8}{'bytes':>12}{'bits/weight':>13}{'order 0':>9}"]
    for row in found["tensors"]:
        shape = "x".join(map(str, row["shape"])) or "1"
        sizes = _sizes(row["bytes"], row["weights"], row["order0_bytes"])
        lines.append(f"{row['name']:<34}{shape:>14}{row['type']:>7}{row['codec'] or '-':>8}{sizes}")
    coded = [row for row in found["tensors"] if row["order0_bytes"] is not None]
    order0 = sum(row["order0_bytes"] for row in coded)
    stored = sum(row["bytes"] for row in coded) if coded and all(row["bytes"] is not None for row in coded) else None
    weights = sum(row["weights"] for row in coded)
    lines.append(f"{'quantised matrices':<34}{weights:>14,}{'':>15}{_sizes(stored, weights, order0)}")
    lines.append(f"{'file':<34}{found['weights']:>14,}{'':>15}{_sizes(found['bytes'], found['weights'], None)}")
    lines += _community_lines(found) if "unsaid" in found else []
    if not found["frequencies"]:
        lines.append("no training frequencies, on which causal builds")
    return "\n".join(map(printable, lines))


def _community_lines(found: dict[str, Any]) -> list[str]:
    """What there is to say of somebody else's file."""
    metadata = found["metadata"]
    lines = [f"form      {metadata['format']}", *_assumed(metadata)]
    if found["unsaid"]:
        names = " or ".join(found["generations"])
        lines.append(f"unsaid    {', '.join(found['unsaid'])}: losses depend on them; --model-config {names}")
    lines += [f"lacks     {part}" for part in found["missing_parts"]]
    if metadata["left_out"]:
        lines.append(f"left out  {', '.join(metadata['left_out'])}: no part in scoring")
    return lines


def _assumed(metadata: Mapping[str, Any]) -> list[str]:
    """Lines, or none, about what somebody else's file does not say of its model."""
    found = ", ".join(f"{key}={value}" for key, value in metadata["assumed"].items())
    named = f", {metadata['generation']} has it so" if "generation" in metadata else ""
    lines = [f"assumed   {found}: nothing in the file says so{named}; --model-config overrides"] if found else []
    if "resembles" in metadata:
        lines.append(f"resembles {' or '.join(metadata['resembles'])}, not {metadata['generation']}")
    return lines


def _sizes(size: int | None, weights: int, order0: float | None) -> str:
    """Bytes, bits a weight, and bits a weight at the entropy bound; dashes for what is not known."""
    cells = [
        "-" if size is None else f"{size:,}",
        "-" if size is None or not weights else f"{8 * size / weights:.3f}",
        "-" if order0 is None or not weights else f"{8 * order0 / weights:.3f}",
    ]
    return f"{cells[0]:>12}{cells[1]:>13}{cells[2]:>9}"


def convert(settings: config.ConvertSettings) -> tuple[dict[str, Any], str]:
    suffix = Path(settings.out).suffix
    if suffix not in (".slotfast", ".ptz"):
        raise InputError(f"{settings.out}: expected a name that ends with .slotfast or .ptz")
    artifact = load_artifact(settings.file, parse_overrides(settings.model_config_))
    assumed, rounded = [] if is_ours(settings.file) else _assumed(artifact.metadata), []
    if not any(isinstance(tensor, QuantizedMatrix) for tensor in artifact.tensors.values()):
        artifact = artifact.quantized()
        rounded = [name for name, tensor in artifact.tensors.items() if isinstance(tensor, QuantizedMatrix)]
    if not is_ours(settings.file):
        artifact = replace(artifact, metadata={"imported": dict(artifact.metadata)})
    size = (write_artifact if suffix == ".slotfast" else write_community)(settings.out, artifact)
    before = Path(settings.file).stat().st_size
    found = {"schema": 1, "file": settings.file, "bytes": before, "out": settings.out, "out_bytes": size}
    found["rounded"] = rounded
    lines = [f"{settings.out}: {size:,} bytes, from {before:,}", *assumed]
    if rounded:
        lines.append(f"rounded   all {len(rounded)} matrices, which were not quantised: 6 bits in blocks, 8 elsewhere")
    if suffix == ".ptz":
        lines.append("left out  window length, other metadata and training frequencies: a .ptz has no place for them")
    return found, "\n".join(lines)
