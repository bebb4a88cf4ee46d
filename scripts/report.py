"""One page that shows what runs did: curves, warnings, and their samples with every token's advantage.

    python -m nanorlhf.scripts.report runs/mine                  # writes runs/mine/report.html
    python -m nanorlhf.scripts.report runs/a runs/b --output ab.html
    python -m nanorlhf.scripts.report runs/mine --serve          # follows a run that goes on

The page is one file that needs no network; it can be written at any time, while the run goes on too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nanorlhf.errors import UsageError
from nanorlhf.records.directory import read_run
from nanorlhf.scripts.reporting.live import serve, stamp
from nanorlhf.system.files import write_whole


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if the page was written or served, 2 if there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories; several are laid over each other")
    parser.add_argument("--output", type=Path, help="(default: report.html in the run, of several in this folder)")
    more = "(default: as many as stay quick to browse)"
    parser.add_argument("--samples", type=int, help=f"of a run, to be read in full {more}")
    parser.add_argument("--serve", action="store_true", help="at an address of this machine, renewed as the runs go on")
    parser.add_argument("--port", type=int, default=8765, help="of that address (default: 8765)")
    args = parser.parse_args(argv)
    try:
        if args.samples is not None and args.samples < 0:
            raise UsageError(f"samples={args.samples} must not be negative")
        if args.serve:
            serve(lambda: written(args.runs, args.samples, stamp(args.runs)), lambda: stamp(args.runs), args.port)
            return 0
        output = args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
        save(output, written(args.runs, args.samples))
        print(f"written to {output} ({output.stat().st_size / 2**20:.1f} MiB)")
    except UsageError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def written(folders: list[Path], samples: int | None, mark: str = "") -> str:
    """The page of these runs as they are now."""
    from nanorlhf.scripts.reporting.page import page
    from nanorlhf.scripts.reporting.samples import LIMIT  # which imports torch, and --help is quick without

    samples = LIMIT if samples is None else samples
    records = [read_run(folder) for folder in folders]
    title = records[0].name if len(records) == 1 else " / ".join(record.name for record in records[:4])
    title += f" and {len(records) - 4} more" if len(records) > 4 else ""
    return page(records, title=title, samples=samples > 0, limit=samples, stamp=mark)


def save(path: Path, text: str) -> None:
    """Whole or not at all: somebody may be reading the last one."""
    try:
        write_whole(path, text, errors="replace")
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
