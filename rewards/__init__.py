"""Rewards by name: one file each, whose function has the file's name."""
