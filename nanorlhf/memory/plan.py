"""A recipe's needs on a GPU, and a plan: what is there in which phase, with how much cache and how many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from nanorlhf.engines.base import CacheBudget
from nanorlhf.memory.workspace import Line, Workspace
from nanorlhf.system.device import CONTEXT, GIB

Phase = Literal["generate", "score", "measure", "update"]
Unit = Literal["engine", "reward model", "reference", "optimizer", "critic", "policy"]
Offload = Literal["auto", "always", "never"]
Tokens = int | None  # of a micro-batch; None: what fits

PHASES: tuple[Phase, ...] = ("generate", "score", "measure", "update")
MOVES: tuple[Unit, ...] = ("engine", "reward model", "reference", "optimizer", "critic", "policy")  # first to last
MARGIN = 3 * GIB // 2  # kept back for what no plan knows: graphs that vLLM captures twice, memory in pieces
SCATTERED = 0.1  # of a pass's workspace: what the allocator cannot use
BUS = 20e9  # bytes a second between the card and pinned main memory: PCIe 4.0 x 16, measured rather than promised
BUSY = 64  # completions of full length decoding at once: for more, nothing else is moved


@dataclass(frozen=True, slots=True)
class Resident:
    """Something on the card, and the phases that cannot do without it."""

    name: str
    bytes: int
    phases: frozenset[Phase]
    unit: Unit | None = None  # what it moves with; None: it does not move
    passing: bool = False  # it is made and dropped in its phase
    kept: bool = False  # main memory has it anyway, so nothing is copied when it leaves
    waiting: int | None = None  # bytes of main memory for it while it is away, if others than its own


@dataclass(frozen=True, slots=True)
class Needs:
    """The memory that a recipe needs on a card."""

    residents: tuple[Resident, ...]
    longest: int  # tokens of the longest row that cannot be cut
    plain: Workspace  # of forward and backward
    recomputed: Workspace  # the same with gradient checkpointing of all layers
    parked: Workspace  # and with the layers' inputs in main memory
    inputs: Line  # these
    parks_from: float  # if they are more than this share of the card, they go there
    reading: Workspace  # of forward alone
    scoring: int = 0  # bytes that the reward model works in
    decoding: int = 0  # bytes that the engine works in
    sequence: int = 0  # bytes of cache for one completion of full length; 0: no engine
    requests: int = 0  # completions that may decode at once
    layers: int = 1  # of the policy
    group: tuple[int, int] = (0, 0)  # tokens of a prompt with all its answers at full length: in rows, and written out
    advice: tuple[str, ...] = ()  # what would make it smaller

    def present(self, phase: Phase, moved: frozenset[Unit]) -> list[Resident]:
        """The residents that are there; a phase that needs none (rewards on the CPU) moves none."""
        if phase == "score" and not any("score" in r.phases for r in self.residents):
            phase = "generate"
        return [r for r in self.residents if phase in r.phases or not (r.passing or r.unit in moved)]

    def learning(self, tokens: int, again: int, card: int) -> int:
        """Bytes that forward and backward of such a row take if the first `again` layers are recomputed."""
        if not again:
            return self.plain(tokens)
        inputs, others = self.inputs(tokens) / self.layers, self.layers - again
        if inputs * again >= self.parks_from * card:
            first, spared = self.parked, 0.0
        else:
            first, spared = self.recomputed, inputs * others
        whole = (self.plain.kept(tokens) - self.recomputed.kept(tokens)) / self.layers + inputs  # what a layer keeps
        kept = first.kept(tokens) - spared + whole * others
        begun = kept + self.plain.body(tokens) - self.plain.kept(tokens) if others else 0  # backward, in the last layer
        ended = first.body(tokens) - spared  # and among the first, when what the others kept is gone
        return round(max(begun, ended, kept + first.head(tokens)))

    def workspace(self, phase: Phase, tokens: int, again: int, card: int) -> int:
        """Bytes that a phase works in, with rows of so many tokens."""
        if phase == "generate":
            return self.decoding
        if phase == "score":
            return self.scoring
        work = self.reading(tokens) if phase == "measure" else self.learning(tokens, again, card)
        return round(work * (1 + SCATTERED))

    @property
    def units(self) -> list[Unit]:
        """The units that can be moved, in the order in which they are."""
        return [u for u in MOVES if any(r.unit == u for r in self.residents)]


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice of what is moved, how large the cache is, and how many tokens a micro-batch has."""

    needs: Needs
    card: int  # bytes
    moved: frozenset[Unit]
    recompute: int  # layers under gradient checkpointing
    tokens: int  # in a micro-batch
    cache: int  # bytes
    reasons: tuple[str, ...] = ()  # for what it costs time

    def rows(self, phase: Phase) -> dict[str, int]:
        """Bytes by name: residents, the cache, the workspace, CUDA's own, and what is kept back."""
        there = self.needs.present(phase, self.moved)
        rows = {r.name: r.bytes for r in there}
        if any(r.unit == "engine" for r in there):
            rows["KV cache"] = self.cache
        return rows | {
            "workspace": self.needs.workspace(phase, self.tokens, self.recompute, self.card),
            "CUDA": CONTEXT,
            "kept back": MARGIN,
        }

    def total(self, phase: Phase) -> int:
        return sum(self.rows(phase).values())

    def on_card(self, phase: Phase) -> frozenset[Unit]:
        """The movable units that are on the card."""
        return frozenset(r.unit for r in self.needs.present(phase, self.moved) if r.unit)

    @property
    def share(self) -> Fraction:
        """Of the layers, those under gradient checkpointing."""
        return Fraction(self.recompute, self.needs.layers)

    @property
    def engine_cache(self) -> CacheBudget:
        """The part of it that the engine is told."""
        return CacheBudget(self.cache, self.needs.sequence, "engine" in self.moved, self.needs.requests)

    @property
    def sequences(self) -> int:
        """Completions of full length that the cache holds."""
        return self.engine_cache.sequences

    @property
    def busy(self) -> bool:
        """Whether as many decode at once as the engine needs to be worth its time."""
        return self.sequences >= min(BUSY, self.needs.requests)

    @property
    def seconds(self) -> float:
        """Seconds that moving costs in a step."""
        copied = 0
        for before, after in zip(PHASES, (*PHASES[1:], PHASES[0]), strict=True):
            old, new = (self.needs.present(phase, self.moved) for phase in (before, after))
            copied += sum(r.bytes for r in new if r.unit and r not in old)
            copied += sum(r.bytes for r in old if r.unit and r not in new and not r.kept)
        return copied / BUS

    def table(self) -> str:
        """Rows of residents, columns of phases, and what follows from them."""
        columns = [self.rows(phase) for phase in PHASES]
        names = list(dict.fromkeys(name for column in columns for name in column))
        names.sort(key=lambda name: name in ("workspace", "CUDA", "kept back"))
        lines = [f"{'GiB':<18}" + "".join(f"{phase:>10}" for phase in PHASES)]
        for name in names:
            cells = (f"{c[name] / GIB:.2f}" if c.get(name) else "-" for c in columns)
            lines.append(f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells))
        lines.append(f"{'in all':<18}" + "".join(f"{self.total(phase) / GIB:>10.2f}" for phase in PHASES))
        return "\n".join([*lines, *self.words()])

    def words(self) -> list[str]:
        """The plan in words."""
        moved = [unit for unit in MOVES if unit in self.moved]
        lines = [f"card: {self.card / GIB:.2f} GiB; " + (f"moved: {', '.join(moved)}" if moved else "nothing is moved")]
        again = "with" if self.recompute else "without"
        some = f" of {self.recompute} of {self.needs.layers} layers" if 0 < self.share < 1 else ""
        lines.append(f"micro-batches: {self.tokens:,} tokens, {again} gradient checkpointing{some}")
        computed, written = self.needs.group
        if computed < written:
            lines.append(f"a group of full length: {computed:,} tokens, its prompt once, instead of {written:,}")
        if self.sequences:
            most = self.engine_cache.at_once
            lines.append(f"cache: {self.sequences} completions of full length; at most {most} decode at once")
        if moved:
            lines.append(
                f"moving: {self.seconds:.1f} s a step at {BUS / 1e9:.0f} GB/s; "
                f"up to {self.main_memory / GIB:.1f} GiB of main memory"
            )
        return [*lines, *self.reasons]

    @property
    def main_memory(self) -> int:
        """Bytes of main memory for what is away, at most."""
        moved = [r for r in self.needs.residents if r.unit in self.moved]
        return sum(r.bytes if r.waiting is None else r.waiting for r in moved)
