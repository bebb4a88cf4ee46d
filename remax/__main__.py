"""`python -m remax`, `nanorlhf remax`."""

import sys

from nanorlhf.system.command import command

main = command("remax")

if __name__ == "__main__":
    sys.exit(main())
