"""`python -m rloo`, `nanorlhf rloo`."""

import sys

from nanorlhf.system.command import command

main = command("rloo")

if __name__ == "__main__":
    sys.exit(main())
