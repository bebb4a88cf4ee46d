"""RAFT: learn the best answer by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.raft.algorithm import RAFT, RAFTTrainer
    from nanorlhf.raft.config import RAFTConfig

__all__ = ["RAFT", "RAFTConfig", "RAFTTrainer"]
__getattr__ = lazily("nanorlhf.raft", __all__)
