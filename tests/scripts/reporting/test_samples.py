"""Which samples a page shows, how all of them are spread, and tokens as text that adds up to what was written."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanorlhf.config.names import shipped_model
from nanorlhf.records.directory import read_run
from nanorlhf.scripts.reporting import samples as module
from nanorlhf.scripts.reporting.samples import Line, choose, excerpts, lengths, rewards, scan, tokens_of
from nanorlhf.scripts.reporting.token_texts import Pieces
from tests.scripts.made_up import write_run


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]


def test_everything_is_shown_where_it_fits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    found, rows = excerpts(read_run(run)), rows_of(run)
    assert found.facts["all"] == len(rows)
    for name in ("step", "index", "completion", "reward", "advantage", "length", "stopped"):
        assert found.facts[name] == [row[name] for row in rows]
    prompts = [found.facts["prompts"][p] for p in found.facts["prompt"]]
    assert prompts == [[[m["role"], m["content"]] for m in row["prompt"]] for row in rows]
    assert found.facts["rewards"] == [[list(pair) for pair in row["rewards"].items()] for row in rows]
    texts, counts = found.facts["pieces"]
    assert list(found.tokens) == [1, 2, 3]
    shown = [sample for step in found.tokens.values() for sample in step]
    for row, (pieces, logprobs, advantages) in zip(rows, shown, strict=True):
        assert "".join(texts[p] for p in pieces) == row["completion"]
        assert sum(counts[p] for p in pieces) == len(logprobs) == len(advantages) == row["length"]
        assert advantages[:2] == pytest.approx([row["advantage"], row["advantage"] - 0.1], abs=1e-4)


def test_choice_takes_whole_groups_first_and_last_step_and_spreads_over_the_others() -> None:
    lines = [
        Line(at=n, step=n // 20, number=n % 20, index=n // 5, reward=0.0, length=10) for n in range(50 * 20)
    ]  # 50 steps of 4 groups of 5
    chosen = choose(lines, limit=150, tokens=10**6)
    assert len(chosen) == 150 and chosen == sorted(chosen, key=lambda line: line.at)
    assert set(Counter(line.index for line in chosen).values()) == {5}
    steps = Counter(line.step for line in chosen)
    assert steps[0] == steps[49] == 20
    between = sorted(step for step in steps if step not in (0, 49))
    assert {steps[step] for step in between} == {5} and len(between) == 22
    assert max(b - a for a, b in zip([0, *between], [*between, 49], strict=True)) <= 6
    assert sum(line.length for line in choose(lines, limit=10**6, tokens=200)) == 200
    assert choose(lines, limit=10**6, tokens=10**6) == lines
    assert choose([], 5, 5) == [] == choose(lines, 0, 10**6)


def test_choice_prefers_prompts_that_come_again() -> None:
    again = {7, 8}
    lines = [
        Line(at=n, step=n // 4, number=n % 4, index=next(iter(again)) if n % 4 == 3 else 100 + n, reward=0.0, length=1)
        for n in range(40)
    ]
    inner = [line for line in choose(lines, limit=16, tokens=10**6) if line.step not in (0, 9)]
    assert len(inner) == 8 and {line.index for line in inner} <= again


def test_scan_knows_where_lines_are_and_leaves_a_torn_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, tokens=False, nasty="\u2028 \x85")
    whole, path = rows_of(run), run / "samples.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "ind')
    lines = list(scan(path))
    assert [(line.step, line.number) for line in lines] == [(step, n) for step in (1, 2) for n in range(8)]
    data = path.read_bytes()
    assert [json.loads(data[line.at :].partition(b"\n")[0]) for line in lines] == whole
    assert list(scan(tmp_path / "none.jsonl")) == []


def test_spread_counts_every_sample() -> None:
    lines = [
        Line(0, step, n, 0, reward, length)
        for step in (1, 2)
        for n, (reward, length) in enumerate([(0.0, 3), (1.0, 99), (1.0, 3), (None, 0)])
    ]
    assert rewards(lines) == {"steps": [1, 2], "counts": [[1, 2]] * 2, "marks": [0.0, 1.0], "edges": False}
    spread = lengths(lines)
    width = spread["marks"][1] - spread["marks"][0]
    assert len(spread["marks"]) == module.BINS + 1 and spread["marks"][0] == 0 and spread["marks"][-1] > 99
    assert width == int(width), "a length falls into one bin, and bins have whole edges"
    assert all(counts[0] == 3 and counts[int(99 // width)] == 1 and sum(counts) == 4 for counts in spread["counts"])
    many = rewards([Line(0, 1, n, 0, n / 100, 1) for n in range(101)])
    assert many["edges"] and sum(many["counts"][0]) == 101 and many["marks"][0] == 0 and many["marks"][-1] == 1
    assert rewards([]) == {"steps": [], "counts": [], "marks": [], "edges": False}


def test_tokens_that_share_a_character_are_one_piece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    pieces = Pieces(tokenizer)
    ids = tokenizer("1 🙂 é<answer>", add_special_tokens=False)["input_ids"]
    found = [(pieces.texts[p], pieces.counts[p]) for p in pieces.of(ids)]
    assert "".join(text for text, _ in found) == "1 🙂 é<answer>"
    assert ("é", 2) in found and any("🙂" in text and count >= 4 for text, count in found)
    assert sum(count for _, count in found) == len(ids)
    half = ids[:4]  # cut off in the middle of a character
    assert sum(pieces.counts[p] for p in pieces.of(half)) == 4
    assert pieces.of([]) == []


def test_a_space_before_a_word_is_kept() -> None:
    """Tokenizers of SentencePiece's kind drop it from the first token that they decode."""
    vocabulary = {"<unk>": 0, "▁a": 1, "a": 2, "▁sum": 3, "s": 4}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=plain))
    assert pieces.decode([3]) == "sum", "or this proves nothing"
    assert [pieces.texts[p] for p in pieces.of([3, 4, 3])] == [" sum", "s", " sum"]


def test_what_an_environment_said_has_neither_probability_nor_advantage() -> None:
    pieces = Pieces(AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder")))
    row = {"completion_ids": [20, 21, 22, 23], "own": [True, False, False, True], "logprobs": [-1.0, -2.0]}
    assert tokens_of(row, pieces)[1:] == [[-1.0, None, None, -2.0], None]
    assert tokens_of(row | {"advantages": [1.0, 2.0]}, pieces)[2] == [1.0, None, None, 2.0]
    assert tokens_of(row | {"advantages": [0.5, 0.5]}, pieces)[2] == 0.5


@pytest.mark.parametrize("lost", ["rollouts", "one file", "other rows"])
def test_runs_without_tokens_are_shown_without(tmp_path: Path, lost: str) -> None:
    run = write_run(tmp_path / "run", steps=2)
    first = run / "rollouts" / "step_000001.parquet"
    if lost == "rollouts":
        shutil.rmtree(first.parent)
    elif lost == "one file":
        first.unlink()
    else:  # of another run, or cut off
        write_run(tmp_path / "other", steps=1, groups=1, size=1)
        shutil.copy(tmp_path / "other" / "rollouts" / first.name, first)
    found = excerpts(read_run(run))
    assert len(found.facts["step"]) == 16
    assert {step: all(tokens) for step, tokens in found.tokens.items()} == {
        "rollouts": {},
        "one file": {2: True},
        "other rows": {1: False, 2: True},
    }[lost]
