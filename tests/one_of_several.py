"""The work of each process of a launched test: several runs, one after the other, for one start of Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nanorlhf.__main__ import main

if __name__ == "__main__":
    sys.exit(max(main(line) for line in json.loads(Path(sys.argv[1]).read_text())))
