"""Build pillow-simd for this processor and install it in place of Pillow.

lapilli simd

What is needed to build it is looked for first, since pillow-simd leaves out silently what it does
not find. Any later install of a package that requires Pillow replaces it; `python -m
pipelines.doctor` and every program that names its codecs tell.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["VERSION", "build_environment", "main", "missing_headers"]

VERSION = "12.1.1.post0"
HEADERS = {  # what shows it, and Debian's package
    "jpeglib.h": "libjpeg-dev",
    "zlib.h": "zlib1g-dev",
    "webp/decode.h": "libwebp-dev",
    "tiff.h": "libtiff-dev",
    "lcms2.h": "liblcms2-dev",
    "openjpeg.h": "libopenjp2-7-dev",
}
FEATURES = ("jpg", "zlib", "libtiff", "webp", "littlecms2", "jpg_2000", "avif", "freetype2")
INSTALL = ("-m", "pip", "install", "--no-cache-dir", "--force-reinstall", "--no-deps")
REPORT = f"""
import PIL
from PIL import features
from lapilli.data.images.codecs import note_simd
note_simd()
lacking = [name for name in {FEATURES} if not features.check(name)]
print(f"Pillow is pillow-simd {{PIL.__version__}}; it lacks: {{', '.join(lacking) or 'nothing'}}")
if "avif" in lacking:
    print("AVIF files will be quarantined as image_undecodable; use stock Pillow for them")
"""


def missing_headers(compiler: str) -> list[str]:
    """Debian packages of the headers that the compiler does not find."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            package
            for header, package in HEADERS.items()
            if not _compiles(compiler, header, Path(folder) / "probe.c")
        ]


def _compiles(compiler: str, header: str, source: Path) -> bool:
    # openjpeg.h lies in a folder named by its version, which pillow-simd looks through
    folders = [str(path) for path in Path("/usr/include").glob("openjpeg-*")]
    source.write_text(f"#include <stddef.h>\n#include <stdio.h>\n#include <{header}>\n")
    command = [compiler, "-E", *(f"-I{folder}" for folder in folders), str(source)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build_environment(compiler: str, flags: set[str], before: Mapping[str, str]) -> dict[str, str]:
    """The build's environment: AVX2 code only where the processor has it."""
    return {**before, "CC": f"{compiler} -mavx2" if "avx2" in flags else compiler}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 if something to build with is missing."""
    del argv
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    packages = ["gcc"] if compiler is None else missing_headers(compiler)
    if compiler is None or packages:
        print(
            f"error: pillow-simd needs {', '.join(packages)}, expected a C compiler and the "
            f"headers of all formats; run: apt-get install {' '.join(packages)}",
            file=sys.stderr,
        )
        return 2
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    wanted = ["--no-binary=pillow-simd", f"pillow-simd=={VERSION}"]
    subprocess.run(
        [sys.executable, *INSTALL, *wanted],
        env=build_environment(compiler, flags, os.environ),
        check=True,
    )
    return subprocess.run([sys.executable, "-c", REPORT], check=True).returncode


if __name__ == "__main__":
    sys.exit(main())
