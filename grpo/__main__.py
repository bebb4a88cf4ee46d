"""`python -m grpo`, `nanorlhf grpo`."""

import sys

from nanorlhf.system.command import command

main = command("grpo")

if __name__ == "__main__":
    sys.exit(main())
