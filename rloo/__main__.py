"""`python -m rloo`, `nanorlhf rloo`."""

import sys

from nanorlhf.cli import command
from nanorlhf.rloo.config import RLOOConfig

main = command("rloo", RLOOConfig)

if __name__ == "__main__":
    sys.exit(main())
