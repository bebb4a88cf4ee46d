"""`python -m online_dpo`, `nanorlhf online_dpo`."""

import sys

from nanorlhf.system.command import command

main = command("online_dpo")

if __name__ == "__main__":
    sys.exit(main())
