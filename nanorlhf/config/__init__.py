"""Every option, its defaults and its checks."""

from nanorlhf.config.option import config, option

__all__ = ["config", "option"]
