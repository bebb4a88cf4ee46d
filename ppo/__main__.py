"""`python -m ppo`, `nanorlhf ppo`."""

import sys

from nanorlhf.cli import command
from nanorlhf.ppo.config import PPOConfig

main = command("ppo", PPOConfig)

if __name__ == "__main__":
    sys.exit(main())
