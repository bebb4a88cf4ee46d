"""DPO: learn from pairs which answer is the better one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.dpo.config import DPOConfig

if TYPE_CHECKING:
    from nanorlhf.dpo.algorithm import DPO, DPOTrainer

__all__ = ["DPO", "DPOConfig", "DPOTrainer"]
__getattr__ = lazily("nanorlhf.dpo.algorithm", "DPO", "DPOTrainer")
