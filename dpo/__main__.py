"""`python -m dpo`, `nanorlhf dpo`."""

import sys

from nanorlhf.cli import command
from nanorlhf.dpo.config import DPOConfig

main = command("dpo", DPOConfig)

if __name__ == "__main__":
    sys.exit(main())
