"""SFT: learn demonstrations by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.sft.algorithm import SFT, SFTTrainer
    from nanorlhf.sft.config import SFTConfig

__all__ = ["SFT", "SFTConfig", "SFTTrainer"]
__getattr__ = lazily("nanorlhf.sft", __all__)
