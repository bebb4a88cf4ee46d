"""The GPU's script: every part for real on a CPU with tiny shapes, and what it makes of failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from evidence.gpu import __main__, shapes
from evidence.gpu import parts as gpu_parts
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.types import Prompt, Sample


def tiny(folder: Path, part: str, **options: Any) -> dict[str, Any]:
    """The figures of a part's first case with these options."""
    case = next(c for c in __main__.CASES if c.part == part and options.items() <= c.options.items())
    return __main__.measured(folder, case, "cpu", tiny=True)


def test_parity(tmp_path: Path) -> None:
    found = tiny(tmp_path, "parity")
    assert found["engine"] == "HFEngine"
    for gap in (found["engine_and_trainer"], found["packed_and_one_by_one"]):
        assert 0 <= gap["mean_abs"] <= gap["max_abs"] < 1e-5
    for way in ("recomputed", "recomputed_and_offloaded"):
        assert found[way]["relative_difference"] == 0 and found[way]["seconds"] > 0


def test_on_a_card_paritys_engine_has_the_cache_that_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes.write(tmp_path / "model", "Qwen2.5-1.5B", "cpu", tiny=True)
    options, given = gpu_parts.options, list[Any]()
    here = {"gpu_memory_gib": 40, "engine": "hf"}
    monkeypatch.setattr(gpu_parts, "options", lambda folder, _, **others: options(folder, "cpu", **others | here))

    def start(*parts: Any) -> None:
        given.extend(parts)
        raise InterruptedError

    monkeypatch.setattr(gpu_parts, "build_engine", start)
    with pytest.raises(InterruptedError):
        gpu_parts.parity(tmp_path, "cuda", True, 4, 16)
    assert given[-1].bytes == 8 * given[-1].sequence > 0


def test_parity_of_a_model_from_a_folder(tmp_path: Path) -> None:
    shapes.write(tmp_path / "real", "Qwen2.5-1.5B", "cpu", tiny=True)
    (tmp_path / "case").mkdir()
    case = __main__.CASES[0]
    found = __main__.measured(tmp_path / "case", case, "cpu", tiny=True, model=str(tmp_path / "real"))
    assert found["engine_and_trainer"]["max_abs"] < 1e-5
    with pytest.raises(FileNotFoundError):
        __main__.measured(tmp_path, case, "cpu", tiny=True, model=str(tmp_path / "nowhere"))


def test_the_trainer_alone(tmp_path: Path) -> None:
    found = tiny(tmp_path, "trainer", tokens=65536)
    assert found["tokens"] == 512 and found["tokens_per_s"] == pytest.approx(512 / found["seconds"])


def test_whole_steps(tmp_path: Path) -> None:
    found = tiny(tmp_path, "steps", length=16000)
    assert found["episodes"] == 16 and found["seconds_per_episode"] > 0 and found["time/update"] > 0
    assert 0 < found["completion/length_mean"] < 16  # drawn, not all at the limit


def test_whole_steps_that_leave_answers_for_the_next(tmp_path: Path) -> None:
    found = tiny(tmp_path, "steps", partial_rollouts=0.5)
    assert found["partial/carried"] > 0 and found["age/old_fraction"] > 0


def test_our_side_of_the_contest(tmp_path: Path) -> None:
    assert tiny(tmp_path, "trl", side="ours")["seconds_per_step"] > 0


def test_the_head(tmp_path: Path) -> None:
    assert tiny(tmp_path, "head")["ours"]["logprobs"] == {"mean_abs": 0, "max_abs": 0}


def test_an_answer_has_one_length_however_often_it_is_asked_for() -> None:
    class Asked:
        request = Sampler.request

    sampler: Any = Asked()
    gpu_parts.drawn(sampler, 8000)

    def room(prompt: int, number: int, written: int = 0) -> int | None:
        sample = Sample(Prompt(prompt, [1], "", {}), [2] * written, [], False, "")
        return sampler.request(number, sample, False, 8000).max_tokens

    lengths = [room(prompt, number) or 0 for prompt in range(50) for number in range(8)]
    assert max(lengths) == 8000 and 1500 < sorted(lengths)[200] < 2600
    assert room(3, 5, written=7) == lengths[29] - 7, "what is left of it"


@pytest.mark.parametrize(
    ("shape", "billions"), [("Qwen3-0.6B", 0.596), ("Qwen3-4B", 4.02), ("Qwen2.5-1.5B", 1.54), ("Qwen2.5-7B", 7.62)]
)
def test_shapes_are_those_of_their_names(shape: str, billions: float) -> None:
    about = dict(shapes.SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(about.pop("model_type")), **about))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("shape", ["Qwen3-0.6B", "Qwen2.5-1.5B"])
def test_a_letter_is_a_token_whatever_class_reads_it(shape: str, tmp_path: Path) -> None:
    shapes.write(tmp_path, shape, "cpu", tiny=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (question,) = gpu_parts.questions(1, 5)
    ids = tokenizer(question["prompt"])["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids) == question["prompt"]
    assert tokenizer.eos_token_id == 0


def test_a_case_that_fails_is_noted_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(case: __main__.Case, *_: Any) -> dict[str, Any]:
        if case.options["length"] == 2048 and case.options["side"] == "trl":
            return {"failed": "out of memory"}
        return {"seconds_per_step": {"ours": 2.0, "trl": 14.0}[case.options["side"]]}

    monkeypatch.setattr(__main__, "in_a_process", measured)
    argv = ["--device", "cpu", "--tiny", "--only", "trl", "--output", str(tmp_path)]
    assert __main__.main(argv) == 1
    report = json.loads((tmp_path / "gpu_trl.json").read_text())
    assert report["trl_over_ours"] == {"Qwen2.5-1.5B, length 8000": 7.0}
    assert len(report["runs"]) == 4 and "only a trial" in report["card"]
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_of_its_own() -> None:
    assert "ours" in __main__.in_a_process(__main__.Case("head", "Qwen3-4B", {"tokens": 8192}), "cpu", True, "")
    failed = __main__.in_a_process(__main__.Case("head", "no such shape", {"tokens": 8192}), "cpu", True, "")
    assert failed == {"failed": "exit 1: KeyError: 'no such shape'"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
