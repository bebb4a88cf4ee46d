"""RAFT: learn the best answer by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.raft.config import RAFTConfig

if TYPE_CHECKING:
    from nanorlhf.raft.algorithm import RAFT, RAFTTrainer

__all__ = ["RAFT", "RAFTConfig", "RAFTTrainer"]
__getattr__ = lazily("nanorlhf.raft.algorithm", "RAFT", "RAFTTrainer")
