"""Online DPO: pairs of the policy's own answers, judged as they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.online_dpo.algorithm import OnlineDPO, OnlineDPOTrainer
    from nanorlhf.online_dpo.config import OnlineDPOConfig

__all__ = ["OnlineDPO", "OnlineDPOConfig", "OnlineDPOTrainer"]
__getattr__ = lazily("nanorlhf.online_dpo", __all__)
