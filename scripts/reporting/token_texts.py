"""Tokens as pieces of text that, put together, are what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.records.directory import RunRecord

HALF = "\ufffd"  # what is decoded from a part of a character
LONGEST = 8  # tokens that may make one character, or a few that share bytes


def tokenizer_of(record: RunRecord) -> PreTrainedTokenizerBase | None:
    """That of the newest checkpoint, or of the model a run starts from; nothing is fetched for it."""
    model = record.options["model_name_or_path"]
    where = names.latest(record.folder) or (shipped_model(model) if model else None)
    if where is None:
        return None
    trusted = record.options["trust_remote_code"]
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trusted, local_files_only=True)
    except (OSError, ValueError):  # never saved, or of a kind that only its own code knows
        return None


class Pieces:
    """Texts by number; most are of one token, some of the few that share a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.counts: list[int] = []  # tokens of each
        self.known: dict[tuple[int, ...], int] = {}
        self.spoken: dict[tuple[int, ...], str] = {}
        self.before = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]  # for which a space is kept
        self.start = self.decode(self.before)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of these tokens in the middle of another: alone, some tokenizers drop the space they begin with."""
        if ids not in self.spoken:
            whole = self.decode([*self.before, *ids])
            inside = self.start and whole.startswith(self.start)
            self.spoken[ids] = whole[len(self.start) :] if inside else self.decode(ids)
        return self.spoken[ids]

    def of(self, ids: Sequence[int]) -> list[int]:
        """The numbers of the pieces that these tokens are."""
        found, at = [], 0
        while at < len(ids):
            size = 1
            while HALF in self.text(tuple(ids[at : at + size])) and size < LONGEST and at + size < len(ids):
                size += 1
            if HALF in self.text(tuple(ids[at : at + size])):
                size = 1  # it is no character, however many follow
            found.append(self.number(tuple(ids[at : at + size])))
            at += size
        return found

    def number(self, ids: tuple[int, ...]) -> int:
        """A piece's number, a new one if it is new."""
        if ids not in self.known:
            self.known[ids] = len(self.texts)
            self.texts.append(self.text(ids))
            self.counts.append(len(ids))
        return self.known[ids]
