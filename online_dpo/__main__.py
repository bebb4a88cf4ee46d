"""`python -m online_dpo`, `nanorlhf online_dpo`."""

import sys

from nanorlhf.cli import command
from nanorlhf.online_dpo.config import OnlineDPOConfig

main = command("online_dpo", OnlineDPOConfig)

if __name__ == "__main__":
    sys.exit(main())
