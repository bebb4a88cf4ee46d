"""`python -m grpo`, `nanorlhf grpo`."""

import sys

from nanorlhf.command import command

main = command("grpo")

if __name__ == "__main__":
    sys.exit(main())
