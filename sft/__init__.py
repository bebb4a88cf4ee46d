"""SFT: learn demonstrations by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.sft.config import SFTConfig

if TYPE_CHECKING:
    from nanorlhf.sft.algorithm import SFT, SFTTrainer

__all__ = ["SFT", "SFTConfig", "SFTTrainer"]
__getattr__ = lazily("nanorlhf.sft.algorithm", "SFT", "SFTTrainer")
