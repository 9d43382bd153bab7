"""The command."""

from collections.abc import Sequence
from pathlib import Path

from .. import config
from ..command.files import atomic_write
from ..command.run import run_command
from ..contest import CAP_BYTES
from ..errors import InputError, reading
from ..words import counted
from .pack import self_extracting

_ABOUT = (
    "The kernels to take along: in a script's one file (--script, --out), or as a folder of the kernel hub (--hub). "
    f"Code and model of more than {CAP_BYTES:,} bytes are refused: nothing is written, exit code 2."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the one file, the hub folder, or both; raises InputError on bad input."""
    settings, sources = config.load(config.BundleSettings, "slotfast bundle", _ABOUT, argv)
    if settings.show_config:
        return print(config.show(settings, sources))
    if settings.script is None and settings.hub is None:
        raise InputError("--script or --hub: give one of them, or both")
    config.check_outputs(settings)
    if settings.script is not None:
        _write_script(settings)
    if settings.hub is not None:
        from .hub import write_hub  # imports torch

        variants = write_hub(Path(settings.hub), settings.name, settings.kernels)
        for variant in variants:
            print(f"{variant}: {counted(sum(1 for _ in variant.rglob('*.py')), 'file')}")
        print(f"loaded by get_local_kernel(Path({settings.hub!r}))")
    return None


def _write_script(settings: config.BundleSettings) -> None:
    script = Path(settings.script)
    if settings.out is None:
        raise InputError("--out: needed with --script")
    from .inline import inline  # imports torch

    plain = inline(script, settings.kernels)
    text = self_extracting(plain) if settings.compress else plain
    size = len(text.encode())
    lines = [f"{settings.out}: {size:,} bytes of code" + (f", {len(plain.encode()):,} extracted" * settings.compress)]
    total = size
    if settings.artifact is not None:
        with reading(settings.artifact):
            model = Path(settings.artifact).stat().st_size
        total += model
        lines.append(f"{settings.artifact}: {model:,} bytes; together {total:,}, {CAP_BYTES - total:,} below the cap")
    if total > CAP_BYTES:
        raise InputError(f"{total:,} bytes of code and model, {total - CAP_BYTES:,} above the cap: nothing is written")
    with atomic_write(settings.out) as file:
        file.write(text.encode())
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
