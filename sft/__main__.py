"""`python -m sft`, `nanorlhf sft`."""

import sys

from nanorlhf.system.command import command

main = command("sft")

if __name__ == "__main__":
    sys.exit(main())
