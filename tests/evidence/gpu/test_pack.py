"""Pieces for a GPU machine, of small wheels made here: what they hold, and that one arrives whole or not at all."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evidence.gpu import pack
from evidence.gpu.pack import EARLY, PACKED, WANTED


def wheel(folder: Path, name: str, files: dict[str, bytes], tag: str = "py3-none-any") -> None:
    """A wheel that pip installs."""
    about = f"{name}-1.0.dist-info"
    files |= {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as packed:
        for path, content in files.items():
            packed.writestr(path, content)


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels that stand for the real ones, for a Python and a system that need not be this one's."""
    shop = tmp_path / "shop"
    shop.mkdir()
    ours = {"peft_like.py": b"NAME = 'ours'", "bin/tool": b"left out"}
    theirs = {"vllm/__init__.py": b"NAME = 'theirs'", EARLY: b"kernels", "vllm/_moe_C.abi3.so": b"left out"}
    wheel(shop, "peft_like", ours)
    wheel(shop, "vllm", theirs, "cp38-abi3-manylinux_2_28_x86_64")
    wheel(
        shop,
        "pycountry",
        {"pycountry/__init__.py": b"", "pycountry/locales/a.mo": b"left out"},
        "cp312-cp312-manylinux2014_x86_64",
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setattr(pack, "WANTED", {"1": ("peft_like==1.0",), "2": ("vllm==1.0", "pycountry==1.0")})
    return tmp_path / "pieces"


def test_pieces_come_out_as_a_folder_of_packages(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack.main(["--output", str(pieces)]) == 0
    said = capsys.readouterr().out
    assert f"{pieces}/1: 0.0 MiB, " in said and f"{pieces}/2: 0.0 MiB, " in said
    site = tmp_path / "site"
    pack.main(["--unpack", str(pieces / "1"), "--site", str(site)])
    assert (site / EARLY).read_bytes() == b"kernels" and not (site / "vllm/__init__.py").exists()
    pack.main(["--unpack", str(pieces / "2"), "--site", str(site)])
    assert not [path for path in site.rglob("*") if path.is_file() and path.read_bytes() == b"left out"]
    there = "import vllm, pycountry, peft_like, nanorlhf.grpo.config, evidence.gpu.first, importlib.metadata as m"
    ask = f"{there}; print(vllm.NAME, peft_like.NAME, m.version('vllm'), nanorlhf.grpo.config.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    ended = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["theirs", "ours", "1.0", f"{site}/nanorlhf/grpo/config.py"]
    assert f"export PYTHONSAFEPATH=1 PYTHONPATH={site}" in capsys.readouterr().out


def test_a_damaged_piece_is_not_unpacked(pieces: Path, tmp_path: Path) -> None:
    pack.main(["--output", str(pieces)])
    with (pieces / "1" / PACKED).open("ab") as packed:
        packed.write(b"0")
    with pytest.raises(SystemExit, match="carry it again"):
        pack.main(["--unpack", str(pieces / "1"), "--site", str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


def test_a_piece_that_is_too_large_is_refused(
    pieces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(pieces.parent / "shop", "peft_like", {"large": random.Random(0).randbytes(2**17)})
    monkeypatch.setattr(pack, "LIMIT", 2**16)
    with pytest.raises(SystemExit, match="piece 1 is above 0 MiB"):
        pack.main(["--output", str(pieces)])
    assert not (pieces / "1").exists() and f"{pieces}/1: 0.1 MiB" in capsys.readouterr().out


def test_what_is_not_to_be_had_ends_it(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "WANTED", {"1": ("nowhere==1.0",)})
    with pytest.raises(SystemExit, match="pip could not fetch"):
        pack.main(["--output", str(pieces)])


def test_every_version_is_named() -> None:
    assert all(requirement.count("==") == 1 for piece in WANTED.values() for requirement in piece)
