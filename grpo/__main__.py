"""`python -m grpo`, `nanorlhf grpo`."""

import sys

from nanorlhf.cli import command
from nanorlhf.grpo.config import GRPOConfig

main = command("grpo", GRPOConfig)

if __name__ == "__main__":
    sys.exit(main())
