"""`python -m reinforce`, `nanorlhf reinforce`."""

import sys

from nanorlhf.system.command import command

main = command("reinforce")

if __name__ == "__main__":
    sys.exit(main())
