"""Choose the image decoder and resizer of this process and record their versions."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import PIL

from lapilli.data.errors import DataError
from lapilli.data.versions import installed_versions

__all__ = [
    "Codecs",
    "Resizer",
    "available_codecs",
    "note_simd",
    "replaced_simd",
    "resolve_codecs",
    "resolve_resizer",
]

Resizer: TypeAlias = Literal["pillow", "simd", "torch"]

SIMD_NOTE = "lapilli-pillow-simd"  # in the environment's folder: the version that was built there


@dataclass(frozen=True)
class Codecs:
    """Decoder and resizer with their versions; equal on every worker of a build."""

    decoder: str
    resizer: Resizer
    resizer_version: str

    def describe(self) -> str:
        """Both with their versions, for a reader."""
        return f"decoder {self.decoder}, resizer {self.resizer} {self.resizer_version}"

    def require(self) -> None:
        """Stop a worker whose libraries differ from the driver's.

        Raises:
            DataError: Names both sides and the remedy.
        """
        here = resolve_codecs(self.resizer)
        if here != self:
            raise DataError(
                f"image codecs differ: this worker has {here.describe()}, the build was planned "
                f"with {self.describe()}; install the same versions on every node"
            )


def is_simd() -> bool:
    """Whether the Pillow that is loaded is pillow-simd (its versions end in `.postN`)."""
    return ".post" in PIL.__version__


def note_simd() -> None:
    """Record in this environment that pillow-simd was built for it."""
    (Path(sys.prefix) / SIMD_NOTE).write_text(PIL.__version__, encoding="utf-8")


def replaced_simd() -> str:
    """One line if pillow-simd was built here and another Pillow is loaded; else ""."""
    try:
        built = (Path(sys.prefix) / SIMD_NOTE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    if built == PIL.__version__:
        return ""
    return (
        f"pillow-simd {built} was built here, Pillow {PIL.__version__} is loaded: an install has "
        "replaced it; run make simd again"
    )


def resolve_resizer(wanted: Literal["auto", "pillow", "simd", "torch"]) -> Resizer:
    """The resizer that a setting selects here; `auto` is torch, else pillow-simd, else Pillow.

    torch and pillow-simd give the same pixels, and Pillow's differ by 1 of 255 in places. torch is
    the fastest: it resizes pixels of three bytes, Pillow converts them to four.

    Raises:
        DataError: The one asked for is not installed.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    if wanted == "auto":
        wanted = "torch" if has_torch else "simd" if is_simd() else "pillow"
    if wanted == "simd" and not is_simd():
        raise DataError(
            f"resizer: simd asked for, Pillow {PIL.__version__} is loaded; install pillow-simd "
            "last with --force-reinstall --no-deps, or set resizer: torch (same pixels)"
        )
    if wanted == "pillow" and is_simd():
        raise DataError(
            f"resizer: pillow asked for, pillow-simd {PIL.__version__} is loaded; reinstall pillow "
            "or set resizer: simd (differs by 1 of 255 here and there)"
        )
    if wanted == "torch" and not has_torch:
        raise DataError(
            "resizer: torch is not installed here; run pip install 'lapilli[train]', or set "
            "resizer: auto"
        )
    return wanted


def available_codecs() -> list[Codecs]:
    """What this process can resize with, the one that `auto` selects first."""
    found: list[Codecs] = []
    for resizer in ("torch", "simd", "pillow"):
        with suppress(DataError):
            found.append(resolve_codecs(resizer))
    return found


def resolve_codecs(wanted: Literal["auto", "pillow", "simd", "torch"]) -> Codecs:
    """Decoder and resizer of this process for one view's setting.

    Raises:
        DataError: The resizer asked for is not installed.
    """
    resizer = resolve_resizer(wanted)
    versions = installed_versions("simplejpeg", "torch")
    decoder = f"simplejpeg {versions['simplejpeg']} and pillow {PIL.__version__}"
    if resizer == "torch":
        # the local part (+cpu, +cu130) is one set of kernels for this operation
        return Codecs(decoder, resizer, versions["torch"].partition("+")[0])
    return Codecs(decoder, resizer, PIL.__version__)
