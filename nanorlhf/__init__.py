"""nanorlhf: reinforcement learning from rewards on one GPU, with vLLM, in a loop you can read."""

import os

# Threads that wait for work must not spin: on shared cores, spinning made a step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
