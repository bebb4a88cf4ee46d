"""`python -m reinforce`, `nanorlhf reinforce`."""

import sys

from nanorlhf.cli import command
from nanorlhf.reinforce.config import REINFORCEConfig

main = command("reinforce", REINFORCEConfig)

if __name__ == "__main__":
    sys.exit(main())
