"""`python -m raft`, `nanorlhf raft`."""

import sys

from nanorlhf.cli import command
from nanorlhf.raft.config import RAFTConfig

main = command("raft", RAFTConfig)

if __name__ == "__main__":
    sys.exit(main())
