"""`python -m ppo`, `nanorlhf ppo`."""

import sys

from nanorlhf.system.command import command

main = command("ppo")

if __name__ == "__main__":
    sys.exit(main())
