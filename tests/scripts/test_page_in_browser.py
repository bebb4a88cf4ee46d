"""A report as a reader meets it: opened as a file in a browser that has no network, looked at, filtered, pointed at."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from selenium.common.exceptions import WebDriverException

from nanorlhf.records.directory import read_run
from nanorlhf.scripts import report
from nanorlhf.scripts.reporting.page import Table, page
from tests.scripts.browser import BROWSER, DRIVER, Browser, browser
from tests.scripts.made_up import NASTY, write_run
from tests.scripts.test_report import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no Chromium with its chromedriver here"),
]
EVIL = NASTY + "\u2028<a href='javascript:window.hacked=1'>"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and their pages: 36 samples whose prompts come again, and another run laid over it, below a wide table."""
    folder = tmp_path_factory.mktemp("pages")
    for number, name in enumerate(("one", "two")):
        write_run(folder / name, steps=12, groups=1, size=3, seed=number)
    runs = [read_run(folder / name) for name in ("one", "two")]
    wide = Table("Who is better", [f"a long head {n}" for n in range(12)], [[f"0.25 ({n}-1)" for n in range(12)]])
    (folder / "both.html").write_text(page(runs, title="one and two", tables=[wide]))
    written(folder / "one.html", folder / "one")
    return folder


def written(file: Path, *runs: Path) -> Path:
    assert report.main([*map(str, runs), "--output", str(file)]) == 0
    return file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Every number of a run, by step and name; the one list has a picture of its own."""
    return {
        row["step"]: {k: v for k, v in row.items() if k not in ("step", "throughput/pace") and v is not None}
        for row in lines(run / "metrics.jsonl")
    }


TITLES = "[...document.querySelectorAll(a[0])].map((e) => Number(e.title))"  # short figures say the whole ones


def cards(window: Browser) -> list[str]:
    """The metrics that have a card of their own."""
    return window.js("[...document.querySelectorAll('figure[data-metric]')].map((e) => e.dataset.metric)")


def values_of(figures: dict[int, dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in figures.values() if name in row]


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", text)]


def test_opens_from_a_file_without_a_network(window: Browser, folder: Path) -> None:
    with pytest.raises(WebDriverException, match="ERR_INTERNET_DISCONNECTED"):
        window.driver.get("http://127.0.0.1/")
    file = folder / "both.html"
    window.open(file)
    window.show("#about")
    assert window.requests() == [file.as_uri()]
    assert window.errors() == []
    assert window.js("performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_large_run_is_quick(window: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", steps=200, groups=10, size=5, words=40)
    file = written(tmp_path / "large.html", run)
    opened = [window.open(file).js("window.drawn") for _ in range(3)]
    assert statistics.median(opened) < 2000, opened
    assert window.texts("#counted") == ["10,000 of 10,000 samples"]
    frames = []
    for typed in ("a", "ad", "add", "add t", "add te", "add ten"):
        start = window.js("performance.now()")
        window.fill("#by-words", typed)
        window.settle()
        frames.append(window.js("performance.now()") - start)
    assert statistics.median(frames) < 250, frames
    kept = sum("add ten" in row["completion"] for row in lines(run / "samples.jsonl"))
    assert 0 < kept < 10_000 and window.texts("#counted") == [f"{kept:,} of 10,000 samples"]
    window.fill("#by-words", "")
    window.js("document.querySelector('.list').scrollTo(0, 1e9)")
    window.wait("document.querySelector('.rows').lastChild.firstChild.textContent === '200'")
    assert window.js("document.querySelectorAll('.rows .row').length") < 100, "only what is in sight is drawn"


INK = """(() => [...document.querySelectorAll('canvas')].map((canvas) => {
  canvas.scrollIntoView();
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
}))()"""  # colours in each picture


def test_every_chart_is_drawn(window: Browser, folder: Path) -> None:
    window.open(folder / "one.html")
    cards = window.js("[...document.querySelectorAll('.card')].map((e) => e.dataset.metric || e.id)")
    assert len(cards) == len(set(cards)) > 15
    for card in cards:
        window.show(f"[data-metric='{card}'], #{card.replace('/', '-')}")
    colours = window.js(INK)
    assert len(colours) == len(cards) and min(colours) >= 3, dict(zip(cards, colours, strict=True))


def test_pointing_at_a_curve_says_what_was_logged(window: Browser, folder: Path) -> None:
    figures = logged(folder / "one")
    window.open(folder / "one.html")
    beside = {"mismatch/mean_abs": "mismatch/max_abs"}
    assert len(cards(window)) >= 12
    for metric in cards(window):
        steps = [step for step, row in figures.items() if metric in row]
        for share in (0.02, 0.4, 0.98):
            at = steps[0] + share * (steps[-1] - steps[0])
            said = window.hover(f"figure[data-metric='{metric}'] .u-over", share)
            for line, name in zip(said.split("\n"), [metric, *filter(None, [beside.get(metric)])], strict=True):
                step, value = numbers(line.split("step", 1)[1])
                assert step == min(steps, key=lambda step: abs(step - at)), line
                assert figures[int(step)][name] == value, line
    said = window.hover("#phases .u-over", 0.5).split("\n")
    times = figures[int(numbers(said[0])[0])]
    assert [line.split("\t") for line in said[1:]] == [
        [name, str(times[f"time/{name}"])] for name in ("rollout", "reward", "measure", "update", "sync", "step")
    ]
    said = window.hover("#pace .u-over", 0.26).split("\n")  # the seventh part of 24
    assert said[0] == "after 27% of the time, tokens/s"
    assert said[1].split("\t") == ["last step", str(10 * (24 - 6) + 12)]
    assert said[2].split("\t") == ["mean of all", "187"], "three digits of 186.5"
    said = window.hover("#rewards canvas", 0.5)
    step, (inside, outside) = int(numbers(said)[0]), numbers(said.split(": ")[1])[:2]
    rewards = [row["reward"] for row in lines(folder / "one" / "samples.jsonl") if row["step"] == step]
    assert (inside, outside) == (rewards.count(0.5), len(rewards)), said


def test_every_figure_is_the_one_that_was_logged(window: Browser, folder: Path) -> None:
    figures = logged(folder / "one")
    window.open(folder / "one.html")
    embedded = window.js("report.runs[0].metrics")
    assert len(embedded.pop("throughput/pace")) == len(embedded["step"])
    assert {
        step: {name: values[i] for name, values in embedded.items() if name != "step" and values[i] is not None}
        for i, step in enumerate(embedded["step"])
    } == figures
    window.click("#figures summary")
    for position, (step, row) in enumerate(figures.items()):
        window.fill("#at-step", str(position))
        assert window.texts("#figures output") == [f"step {step}"]
        cells = window.texts("#figures td")
        shown = dict(zip(cells[::2], cells[1::2], strict=True))
        pace = shown.pop("throughput/pace", None)
        assert {name: float(value) for name, value in shown.items()} == row
        assert pace is None or pace.split(",") == [str(10 * (24 - part) + step) for part in range(24)]
    ends = {name: values_of(figures, name)[:: len(values_of(figures, name)) - 1] for name in cards(window)}
    for name, values in ends.items():
        assert window.js(TITLES, f"figure[data-metric='{name}'] .figure") == values, name
    peak = values_of(figures, "memory/peak_gib")[-1]
    assert window.js(TITLES, "#runs .figure") == [*ends["eval/reward"], *ends["reward/mean"], peak]


def listed(window: Browser) -> list[tuple[str, ...]]:
    """The samples in the list: step, reward, length, prompt and completion."""
    rows = window.js("[...document.querySelectorAll('.rows .row')].map((r) => [...r.children].map((c) => c.innerText))")
    return [(step, reward, length, words) for step, reward, _, length, words in rows]


def as_listed(row: dict[str, Any]) -> tuple[str, ...]:
    flag = "" if row["stopped"] else "cut off "
    prompt = "\n".join(message["content"] for message in row["prompt"])
    words = f"{flag}{prompt} {row['completion']}".replace("\n", " ")
    return str(row["step"]), f"{row['reward']:g}", str(row["length"]), words


FILTERS: list[tuple[dict[str, str], Any]] = [
    ({}, lambda row: True),
    ({"#by-step": "7"}, lambda row: row["step"] == 7),
    ({"#by-words": "4+7="}, lambda row: "4+7=" in row["prompt"][1]["content"]),
    ({"#by-words": "ÜNLIKE"}, lambda row: "ünlike" in row["completion"]),
    ({"#by-low": "0.5"}, lambda row: row["reward"] >= 0.5),
    ({"#by-high": "0.5"}, lambda row: row["reward"] <= 0.5),
    ({"#by-low": "0.5", "#by-high": "0.5"}, lambda row: row["reward"] == 0.5),
    ({"#only": "better"}, lambda row: row["advantage"] > 0),
    ({"#only": "worse"}, lambda row: row["advantage"] < 0),
    ({"#only": "cut"}, lambda row: not row["stopped"]),
    ({"#only": "unscored"}, lambda row: False),
    (
        {"#by-step": "11", "#by-words": "1+7=", "#by-low": "0.25"},
        lambda row: row["step"] == 11 and row["reward"] > 0.25,
    ),
]


@pytest.mark.parametrize(("fields", "passes"), FILTERS, ids=[" ".join(fields.values()) for fields, _ in FILTERS])
def test_filters_leave_the_right_samples(window: Browser, folder: Path, fields: dict[str, str], passes: Any) -> None:
    rows = lines(folder / "one" / "samples.jsonl")
    kept = [as_listed(row) for row in rows if passes(row)]
    window.open(folder / "one.html")
    for css, value in fields.items():
        window.fill(css, value)
    assert listed(window) == kept
    assert window.texts("#counted") == [f"{len(kept)} of {len(rows)} samples"]


def test_samples_are_sorted(window: Browser, folder: Path) -> None:
    rows = lines(folder / "one" / "samples.jsonl")
    window.open(folder / "one.html")
    for name, reverse in (("reward", True), ("length", True), ("length", False)):
        window.click(f"[data-sort={name}]")
        assert listed(window) == [as_listed(row) for row in sorted(rows, key=lambda row: row[name], reverse=reverse)]


TINTS = """[...document.querySelectorAll('#completion span')].map((e) => {
  const [r, g, b, alpha] = getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
  return [e.textContent, b > r ? 'blue' : 'orange', alpha ?? 1];
})"""


@pytest.mark.parametrize("colour", ["advantage", "log-probability"])
def test_tokens_are_coloured_by_what_was_kept_of_them(window: Browser, folder: Path, colour: str) -> None:
    row = lines(folder / "one" / "samples.jsonl")[4]
    kept = pyarrow.parquet.read_table(folder / "one" / "rollouts" / "step_000002.parquet").to_pylist()[1]
    window.open(folder / "one.html")
    window.fill("select[aria-label='coloured by']", colour)
    window.js("document.querySelectorAll('.rows .row')[4].click()")
    shown = window.wait(f"document.querySelector('#completion span') && {TINTS}")
    assert window.texts("#completion") == [row["completion"]]
    assert dict(zip(window.texts(".facts dt"), window.texts(".facts dd"), strict=True)) == {
        "step": "2",
        "prompt": f"#{row['index']}",
        "reward": f"{row['reward']:g}",
        "exact_answer": f"{row['reward']:g}",
        "format": "none",
        "advantage": str(row["advantage"]),
        "tokens": str(row["length"]),
        "ended": "by itself" if row["stopped"] else "cut off",
    }
    values = [round(v, 4) for v in kept["advantages" if colour == "advantage" else "logprobs"]]
    assert min(values) < 0 and (max(values) > 0 or colour != "advantage"), "both colours, or this proves half"
    limit = max(map(abs, values)) if colour == "advantage" else 5
    at = 0
    for text, hue, strength in shown:
        count = window.js("report && samplesOf(0).pieces[1][samplesOf(0).pieces[0].indexOf(a[0])]", text)
        value = statistics.fmean(values[at : at + count])
        at += count
        assert strength == pytest.approx(0.65 * min(1, abs(value) / limit), abs=0.006), text
        assert strength < 0.02 or hue == ("blue" if value > 0 else "orange"), text
    assert at == len(values)
    said = window.hover("#completion span")
    assert json.loads(said.split("\n")[0]) == shown[0][0] and str(round(kept["logprobs"][0], 4)) in said


def test_difference_between_steps_of_a_prompt(window: Browser, folder: Path) -> None:
    rows = lines(folder / "one" / "samples.jsonl")
    mine, theirs = rows[0], [row for row in rows if row["step"] == 11]
    assert mine["prompt"] == theirs[0]["prompt"] and mine["completion"] != theirs[1]["completion"]
    window.open(folder / "one.html")
    assert window.texts("#against option") == [f"step 11, reward {row['reward']:g}" for row in theirs]
    window.fill("#against", "1")
    assert "".join(window.texts("#difference :not(ins)")) == theirs[1]["completion"]
    assert "".join(window.texts("#difference :not(del)")) == mine["completion"]
    assert all(window.texts(f"#difference {kind}") for kind in ("ins", "del", "span"))
    window.click(".answers button:not(.picked)")
    assert window.texts("#completion")[0] in [row["completion"] for row in rows[1:3]]


NEAR = """(() => {
  const canvas = document.querySelector("[data-metric='reward/mean'] canvas");
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return [0, 1].map((n) => {
    const want = style(`--run-${n}`).match(/[0-9a-f]{2}/g).map((h) => parseInt(h, 16));
    let near = 0;
    for (let i = 0; i < pixels.length; i += 4)
      near += pixels[i + 3] > 200 && want.every((v, c) => Math.abs(pixels[i + c] - v) < 12);
    return near;
  });
})()"""  # pixels in each run's colour


def test_two_runs_lie_over_each_other(window: Browser, folder: Path) -> None:
    figures = {name: logged(folder / name) for name in ("one", "two")}
    window.open(folder / "both.html")
    curve = "[data-metric='reward/mean'] .u-over"
    said = [line.split("\t") for line in window.hover(curve).split("\n")]
    assert [name.strip() for name, *_ in said] == ["one", "two"]
    for name, step, value in said:
        assert figures[name.strip()][int(numbers(step)[0])]["reward/mean"] == float(value)
    assert min(window.js(NEAR)) > 20
    window.click(".chip[data-run='0']")
    window.show(curve)
    first, second = window.js(NEAR)
    assert first == 0 and second > 20 and "one" not in window.hover(curve)
    window.fill("section#samples select[aria-label=Run]", "1")
    assert listed(window)[0] == as_listed(lines(folder / "two" / "samples.jsonl")[0])
    assert any(option.startswith("one, step 1,") for option in window.texts("#against option"))


OUTSIDE = """[...document.querySelectorAll('body *')].filter((e) => {
  const shape = e.getBoundingClientRect();
  if (!shape.width || e.closest('script')) return false;
  let inside = false;
  for (let up = e.parentElement; up; up = up.parentElement) inside ||= getComputedStyle(up).overflowX !== 'visible';
  if (!inside && (shape.right > innerWidth + 0.5 || shape.left < -0.5)) return true;
  const look = getComputedStyle(e);
  const cut = look.overflowX === 'hidden' && look.textOverflow !== 'ellipsis' && e.scrollWidth > e.clientWidth + 1;
  const meant = e.matches('.list, .u-wrap *, .plot');
  return cut && !meant;
}).map((e) => e.outerHTML.slice(0, 120))"""  # what sticks out of the window, or is cut off with no sign of it

FAINT = """(() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const paint = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  let read = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest('script, noscript') || !e.getClientRects().length) continue;
    const under = [];
    for (let up = e; up; up = up.parentElement) under.unshift(getComputedStyle(up).backgroundColor);
    const [text, ground] = [paint([...under, getComputedStyle(e).color]), paint(under)].map(light);
    const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    read += 1;
    if (contrast < 4.5) found[`${e.tagName}.${e.className} ${walk.currentNode.data.slice(0, 30)}`] = contrast;
  }
  return [read, found];
})()"""  # how many texts there are, and which of them stand out too little from what is under them


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_fits_and_can_be_read(window: Browser, folder: Path, width: int, theme: str) -> None:
    window.look(width, 2000, theme)
    try:
        for name in ("one.html", "both.html"):
            window.open(folder / name)
            assert window.js("document.documentElement.dataset.theme") == theme
            for part in ("figures", "options", "about"):
                window.click(f"#{part} summary")
            for colour in ("advantage", "log-probability"):
                window.fill("select[aria-label='coloured by']", colour)
                window.wait("document.querySelector('#completion .token')")
                read, faint = window.js(FAINT)
                assert read > 200 and faint == {}
            assert window.js("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
            assert window.js(OUTSIDE) == []
            window.hover("[data-metric='mismatch/mean_abs'] .u-over", 0.95)
            assert window.js(OUTSIDE) == []
    finally:
        window.look(1440, 900)


def test_whatever_a_run_wrote_stays_text(window: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "evil", steps=3, groups=1, size=3, nasty=EVIL, run_name=EVIL)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, f"reward/{EVIL}": 0.5, "time/step": 1.0}) + "\n")
    row = lines(run / "samples.jsonl")[0]
    window.open(written(tmp_path / "evil.html", run))
    window.click("#figures summary")
    window.click("#options summary")
    window.wait("document.querySelector('#completion span')")
    assert window.js("window.hacked") is None and window.errors() == []
    assert window.js("document.querySelectorAll('img, svg, a, iframe, [onload], [onerror]').length") == 0
    assert window.js("document.querySelectorAll('script:not([type])').length") == 1
    assert window.texts("h1") == window.texts(".run") == [EVIL]
    assert window.texts("#completion") == [row["completion"]]
    assert window.texts(".text.prompt > div") == [m["role"] + m["content"] for m in row["prompt"]]
    facts = dict(zip(window.texts(".facts dt"), window.texts(".facts dd"), strict=True))
    assert facts["fault"] == EVIL and facts["exact_answer" + EVIL] == f"{row['reward']:g}"
    assert json.loads(facts[EVIL]) == {"why": EVIL}
    assert f"reward/{EVIL}" in window.texts("#figures td") and EVIL in window.texts("#figures th")
    assert json.dumps(EVIL, ensure_ascii=False) in window.texts("#options td")
    assert EVIL[-40:] in window.texts(".rows .words")[0]


def test_served_page_follows_its_run(window: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "live", steps=2)
    window.network(on=True)
    try:
        with serving(run) as url:
            window.open(f"{url}/")
            assert window.texts("#runs td")[2] == "2 of 2"
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 3, "loss": 0.5, "time/step": 1.0}) + "\n")
            window.wait("document.querySelectorAll('#runs td')[2]?.textContent === '3 of 2'")
            assert window.errors() == []
            window.driver.get("about:blank")
    finally:
        window.network(on=False)
