"""`python -m raft`, `nanorlhf raft`."""

import sys

from nanorlhf.system.command import command

main = command("raft")

if __name__ == "__main__":
    sys.exit(main())
