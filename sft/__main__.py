"""`python -m sft`, `nanorlhf sft`."""

import sys

from nanorlhf.cli import command
from nanorlhf.sft.config import SFTConfig

main = command("sft", SFTConfig)

if __name__ == "__main__":
    sys.exit(main())
