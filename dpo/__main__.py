"""`python -m dpo`, `nanorlhf dpo`."""

import sys

from nanorlhf.system.command import command

main = command("dpo")

if __name__ == "__main__":
    sys.exit(main())
