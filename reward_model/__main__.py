"""`python -m reward_model`, `nanorlhf reward_model`."""

import sys

from nanorlhf.system.command import command

main = command("reward_model")

if __name__ == "__main__":
    sys.exit(main())
