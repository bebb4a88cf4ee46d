"""`python -m remax`, `nanorlhf remax`."""

import sys

from nanorlhf.cli import command
from nanorlhf.remax.config import ReMaxConfig

main = command("remax", ReMaxConfig)

if __name__ == "__main__":
    sys.exit(main())
