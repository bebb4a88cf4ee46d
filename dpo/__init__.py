"""DPO: learn from pairs which answer is the better one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.dpo.algorithm import DPO, DPOTrainer
    from nanorlhf.dpo.config import DPOConfig

__all__ = ["DPO", "DPOConfig", "DPOTrainer"]
__getattr__ = lazily("nanorlhf.dpo", __all__)
