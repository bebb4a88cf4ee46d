"""Runs as one HTML file that needs no network and lets nothing that a run wrote become script."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from nanorlhf.records.diagnosis import Diagnosis, remarks
from nanorlhf.records.directory import RunRecord
from nanorlhf.records.metrics import PHASES, finite
from nanorlhf.scripts.reporting.samples import LIMIT, Excerpts, excerpts

WEB = Path(__file__).with_name("web")
STYLES = ("uplot.css", "page.css")
SCRIPTS = ("uplot.js", "diff.js", "data.js", "charts.js", "detail.js", "samples.js", "main.js")


@dataclass(frozen=True, slots=True)
class Table:
    """Figures or words under a caption."""

    caption: str
    heads: list[str]
    rows: list[list[str]]


def page(
    records: Sequence[RunRecord],
    *,
    title: str,
    tables: Sequence[Table] = (),
    samples: bool = True,
    limit: int = LIMIT,
    stamp: str = "",
) -> str:
    """The whole page; with a stamp it asks its own server for a newer one."""
    shown = [excerpts(record, limit) for record in records] if samples else []
    parts = {
        "title": html.escape(title),
        "policy": html.escape(policy(bool(stamp))),
        "style": style(),
        "script": script(),
        "data": block("report", summary(records, title, tables, stamp)),
        "samples": "\n".join(part for run, found in enumerate(shown) for part in sample_blocks(run, found)),
    }
    return Template((WEB / "page.html").read_text()).substitute(parts)


def style() -> str:
    return "\n".join((WEB / name).read_text() for name in STYLES)


def script() -> str:
    return "\n".join((WEB / name).read_text() for name in SCRIPTS)


def policy(live: bool) -> str:
    """The content security policy: these very scripts and styles, and no connection but to where the page is from."""
    rules = {
        "default-src": "'none'",
        "script-src": digest(script()),
        "style-src": digest(style()),
        "img-src": "data:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def digest(text: str) -> str:
    """The name that a policy has for a text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def block(name: str, value: Any) -> str:
    """JSON inside HTML: no `<` in it, so that nothing can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def packed(name: str, value: Any) -> str:
    """The same if there is much of it: compressed."""
    text = gzip.compress(json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), mtime=0)
    return f'<script type="text/plain" id="{name}">{base64.b64encode(text).decode()}</script>'


def sample_blocks(run: int, found: Excerpts) -> list[str]:
    """A run's samples in one block, and the tokens of each step in blocks that are unpacked when they are asked for."""
    steps = [packed(f"tokens-{run}-{step}", tokens) for step, tokens in found.tokens.items()]
    return [block(f"samples-{run}", found.facts), *steps]


def summary(records: Sequence[RunRecord], title: str, tables: Sequence[Table], stamp: str) -> dict[str, Any]:
    """The data of a page as it opens, before any sample is looked at."""
    names = Counter(record.name for record in records)
    runs = [one_run(r, r.name if names[r.name] == 1 else f"{r.name} ({r.folder})") for r in records]
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    given = [asdict(table) for table in tables]
    return {"title": title, "made": made, "stamp": stamp, "phases": PHASES, "runs": runs, "tables": given}


def one_run(record: RunRecord, name: str) -> dict[str, Any]:
    """A run's facts, options and every figure it logged, as they are."""
    metrics = dict.fromkeys(key for row in record.rows for key in row)
    return {
        "name": name,
        "folder": str(record.folder),
        "algorithm": record.algorithm,
        "about": record.about,
        "options": {key: json.dumps(value, ensure_ascii=False) for key, value in record.options.items()},
        "planned": record.options["max_steps"],
        "metrics": {key: [finite(row.get(key)) for row in record.rows] for key in metrics},
        "remarks": warned(record.rows),
    }


def warned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The warnings of a run, a kind each: since when, until when, in how many steps."""
    kinds: dict[str, list[Diagnosis]] = {}
    for remark in remarks(rows):
        kinds.setdefault(remark.kind, []).append(remark)
    return [
        {
            "kind": kind,
            "first": found[0].step,
            "last": found[-1].step,
            "count": len(found),
            "words": found[0].words,
            "then": found[-1].words,
            "advice": found[0].advice,
        }
        for kind, found in kinds.items()
    ]
