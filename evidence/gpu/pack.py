"""Packs what a GPU machine without a network lacks, to be carried there: `python3 evidence/gpu/pack.py`.

Such a machine is taken to have Python 3.12, torch 2.11 for CUDA 13, transformers and what these require; docs/gpu.md.
Piece 1 serves runs without vLLM, both together vLLM on a Hopper card. There, `python3 evidence/gpu/pack.py --unpack
.gpu/1` checks a piece and adds it to a folder of packages, the project's own among them. Nothing but pip is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60 * 2**20
PACKED, SUM = "packages.tar.xz", "SHA256"
THERE = ["--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none"]
THERE += [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (39, 35, 34, 31, 28, 27, 24, 17)]
THERE += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]

WANTED: dict[str, tuple[str, ...]] = {  # by piece
    "1": (
        "antlr4-python3-runtime==4.13.2",
        "datasets==5.2.0",
        "dill==0.4.1",
        "jsonargparse==4.53.0",
        "latex2sympy2-extended==1.11.0",
        "math-verify==0.9.0",
        "multiprocess==0.70.19",
        "peft==0.21.2",
        "plotext==5.3.2",
        "simpleeval==1.0.8",
        "typeguard==4.6.1",
    ),
    "2": (
        "vllm==0.26.0",  # the newest that is built for torch 2.11
        "annotated-types==0.8.0",
        "apache-tvm-ffi==0.1.10",
        "blake3==1.0.11",
        "cachetools==8.0.0",
        "cbor2==6.2.1",
        "compressed-tensors==0.17.0",
        "distro==1.9.0",
        "fastapi==0.136.3",
        "httpcore2==2.16.2",
        "httpx2==2.16.2",
        "jiter==0.19.0",
        "jsonschema==4.26.0",
        "jsonschema-specifications==2025.9.1",
        "llguidance==1.7.6",
        "loguru==0.7.3",
        "mistral-common==1.13.1",
        "msgspec==0.22.0",
        "openai==3.52.0",
        "openai-harmony==0.0.8",
        "partial-json-parser==0.2.1.1.post7",
        "pybase64==1.5.1",
        "pycountry==26.2.16",
        "pydantic==2.14.3",
        "pydantic-core==2.50.4",
        "pydantic-extra-types==2.11.1",
        "python-multipart==0.0.34",
        "pyzmq==27.3.0",
        "referencing==0.37.0",
        "rpds-py==2026.9.1",
        "setproctitle==1.3.8",
        "sniffio==1.3.1",
        "starlette==1.10.0",
        "truststore==0.10.5",
        "typing-inspection==0.4.5",
        "xgrammar==0.2.7",
    ),
}
EARLY = "vllm/_C_stable_libtorch.abi3.so"  # of piece 2's packages, but only piece 1 has room for it
LEFT_OUT = (  # nothing that a dense language model on a Hopper card needs
    "bin/*",
    "*/_vllm_fa2_C.*",  # attention before Hopper
    "vllm/_moe_C*",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/vllm-rs",  # a server
    "mistral_common/data/*",
    "pycountry/locales/*",
)


def install(requirements: Sequence[str], folder: Path) -> None:
    """Puts these distributions, as that machine takes them, into a folder."""
    how = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", *how, *THERE, "--target", str(folder), *requirements]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("pack: error: pip could not fetch all of it; the reason is above")


def contents(scratch: Path) -> dict[str, dict[str, Path]]:
    """The contents of each piece: names in the folder of packages, and the files that lie in `scratch`."""
    pieces: dict[str, dict[str, Path]] = {}
    for piece, requirements in WANTED.items():
        folder = scratch / piece
        install(requirements, folder)
        named = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        pieces[piece] = {n: path for n, path in named.items() if not any(fnmatch(n, left) for left in LEFT_OUT)}
    pieces["1"][EARLY] = pieces["2"].pop(EARLY)
    return pieces


def write(piece: Path, files: dict[str, Path]) -> int:
    """Packs a piece, with a sum to check it by; its bytes."""
    shutil.rmtree(piece, ignore_errors=True)
    piece.mkdir(parents=True)
    with tarfile.open(piece / PACKED, "w:xz") as packed:
        for name, path in files.items():
            packed.add(path, name)
    (piece / SUM).write_text(digest(piece / PACKED) + "\n")
    return (piece / PACKED).stat().st_size


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(output: Path) -> None:
    """Writes every piece and says how large it is; one that is too large to be carried does not stay."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, files in contents(Path(scratch)).items():
            size = write(output / name, files)
            print(f"{output / name}: {size / 2**20:.1f} MiB, {len(files):,} files", flush=True)
            if size > LIMIT:
                shutil.rmtree(output / name)
                raise SystemExit(
                    f"pack: error: piece {name} is above {LIMIT / 2**20:.0f} MiB; add to LEFT_OUT in {__file__}"
                )


def unpack(piece: Path, site: Path) -> None:
    """Adds a piece to the folder of packages, if it came whole, and links to the project's own."""
    if digest(piece / PACKED) != (piece / SUM).read_text().strip():
        raise SystemExit(f"pack: error: {piece / PACKED} is not what was packed; carry it again")
    with tarfile.open(piece / PACKED) as packed:
        packed.extractall(site, filter="data")
    link(site)
    print(f"export PYTHONSAFEPATH=1 PYTHONPATH={site}")


def link(site: Path) -> None:
    """Lets `import nanorlhf.grpo` find grpo/ and so on, as an installation would."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, folder in (folders | {"evidence": "evidence"}).items():
        package = site.joinpath(*name.split("."))
        package.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).iterdir():
            (package / path.name).unlink(missing_ok=True)
            (package / path.name).symlink_to(path)


def main(argv: list[str] | None = None) -> int:
    """Packs, or unpacks one piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".gpu"), help="Where pieces go (default: .gpu).")
    parser.add_argument("--unpack", type=Path, metavar="PIECE", help="Instead, add this piece to the packages.")
    parser.add_argument("--site", type=Path, default=Path.home() / "gpu-site", help="Packages (default: ~/gpu-site).")
    options = parser.parse_args(argv)
    if options.unpack:
        unpack(options.unpack, options.site)
    else:
        pack(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
