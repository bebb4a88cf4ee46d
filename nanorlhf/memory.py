"""Who is on the GPU in which phase, and how much cache and how many tokens fit beside: a plan, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nanorlhf.errors import UsageError
from nanorlhf.workspace import Line, Workspace

Phase = Literal["generate", "score", "measure", "update"]
Unit = Literal["engine", "reward model", "reference", "optimizer", "critic", "policy"]
Offload = Literal["auto", "always", "never"]
Tokens = int | None  # of a micro-batch; None: what fits

PHASES: tuple[Phase, ...] = ("generate", "score", "measure", "update")
MOVES: tuple[Unit, ...] = ("engine", "reward model", "reference", "optimizer", "critic", "policy")  # first to last
GIB = 2**30
CONTEXT = GIB  # CUDA's own, and its libraries'
MARGIN = 3 * GIB // 2  # kept back for what no plan knows: graphs that vLLM captures twice, memory in pieces
SCATTERED = 0.1  # of a pass's workspace: what the allocator cannot use
BUS = 20e9  # bytes a second between the card and pinned main memory: PCIe 4.0 x 16, measured rather than promised
BUSY = 64  # completions of full length decoding at once: for more, nothing else is moved
ROW = 16384  # tokens in a micro-batch: more are no faster


@dataclass(frozen=True, slots=True)
class Resident:
    """Something on the card, and the phases that cannot do without it."""

    name: str
    bytes: int
    phases: frozenset[Phase]
    unit: Unit | None = None  # what it moves with; None: it does not move
    passing: bool = False  # it is made and dropped in its phase
    kept: bool = False  # main memory has it anyway, so nothing is copied when it leaves


@dataclass(frozen=True, slots=True)
class Needs:
    """What a recipe needs of a card."""

    residents: tuple[Resident, ...]
    longest: int  # tokens of the longest row that cannot be cut
    plain: Workspace  # of forward and backward
    recomputed: Workspace  # the same with gradient checkpointing
    parked: Workspace  # and with the layers' inputs in main memory
    inputs: Line  # these
    parks_from: float  # where they are more than this share of the card, they go there
    reading: Workspace  # of forward alone
    scoring: int = 0  # bytes that the reward model works in
    decoding: int = 0  # bytes that the engine works in
    sequence: int = 0  # bytes of cache for one completion of full length; 0: no engine
    requests: int = 0  # completions that may decode at once
    advice: tuple[str, ...] = ()  # what would make it smaller

    def present(self, phase: Phase, moved: frozenset[Unit]) -> list[Resident]:
        """Who is there; a phase that needs nobody (rewards on the CPU) moves nobody."""
        if phase == "score" and not any("score" in r.phases for r in self.residents):
            phase = "generate"
        return [r for r in self.residents if phase in r.phases or not (r.passing or r.unit in moved)]

    def learning(self, tokens: int, recompute: bool, card: int) -> Workspace:
        """What forward and backward of such a row take."""
        if not recompute:
            return self.plain
        return self.parked if self.inputs(tokens) >= self.parks_from * card else self.recomputed

    def workspace(self, phase: Phase, tokens: int, recompute: bool, card: int) -> int:
        """Bytes that a phase works in, with rows of so many tokens."""
        if phase == "generate":
            return self.decoding
        if phase == "score":
            return self.scoring
        work = self.reading if phase == "measure" else self.learning(tokens, recompute, card)
        return round(work(tokens) * (1 + SCATTERED))

    @property
    def units(self) -> list[Unit]:
        """What can be moved, in the order in which it is."""
        return [u for u in MOVES if any(r.unit == u for r in self.residents)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is moved, how large the cache is, and how many tokens a micro-batch has."""

    needs: Needs
    card: int  # bytes
    moved: frozenset[Unit]
    recompute: bool  # gradient checkpointing
    tokens: int  # in a micro-batch
    cache: int  # bytes

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
    def sequences(self) -> int:
        """Completions of full length that the cache holds."""
        return self.cache // self.needs.sequence if self.needs.sequence else 0

    @property
    def seconds(self) -> float:
        """What moving costs in a step."""
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
        lines.append(f"micro-batches: {self.tokens:,} tokens, {again} gradient checkpointing")
        if self.sequences:
            lines.append(
                f"cache: {self.sequences} completions of full length at once, of at most {self.needs.requests}"
            )
        if moved:
            lines.append(
                f"moving: {self.seconds:.1f} s a step at {BUS / 1e9:.0f} GB/s; "
                f"{self.main_memory / GIB:.1f} GiB of main memory"
            )
        return lines

    @property
    def main_memory(self) -> int:
        """Bytes of main memory for what is away."""
        return sum(r.bytes for r in self.needs.residents if r.unit in self.moved)


def make_plan(
    needs: Needs,
    card: int,
    offload: Offload = "auto",
    recompute: bool | Literal["auto"] = "auto",
    token_budget: Tokens = None,
) -> Plan:
    """The plan that moves least where much fits, else the one with most cache; a UsageError where none works.

    Gradient checkpointing costs more time than moving anything, so it comes last.
    """
    tries = [
        attempt(needs, card, moved, again, token_budget)
        for again in ((False, True) if recompute == "auto" else (recompute,))
        for moved in ways_to_move(needs, offload)
    ]
    plans = [plan for plan, _ in tries if plan]
    enough = min(BUSY, needs.requests) * needs.sequence
    for plan in plans:
        if plan.cache >= enough:
            return plan
    if plans:
        return max(plans, key=lambda plan: plan.cache)
    missing, phase = min(lacking for _, lacking in tries)
    one = " with one completion of full length" if phase == "generate" else ""
    raise UsageError(
        f"the {phase} phase{one} needs {(card + missing) / GIB:.1f} GiB for samples of {needs.longest:,} tokens, "
        f"{missing / GIB:.1f} GiB more than the card has; try: {remedies(needs, offload, recompute, token_budget)}"
    )


def ways_to_move(needs: Needs, offload: Offload) -> Iterator[frozenset[Unit]]:
    """Nothing, then one unit more each time; or only the first or the last of these."""
    units = needs.units
    counts = {"auto": range(len(units) + 1), "always": [len(units)], "never": [0]}[offload]
    return (frozenset(units[:n]) for n in counts)


def attempt(
    needs: Needs, card: int, moved: frozenset[Unit], recompute: bool, token_budget: Tokens
) -> tuple[Plan | None, tuple[int, Phase]]:
    """The plan where these units are moved, or by how many bytes it fails, and in which phase."""
    room: dict[Phase, int] = {
        p: card - CONTEXT - MARGIN - sum(r.bytes for r in needs.present(p, moved)) for p in PHASES
    }
    cached: list[Phase] = [p for p in PHASES if any(r.unit == "engine" for r in needs.present(p, moved))]
    least = max(needs.longest, 0 if token_budget is None else token_budget)

    def left(tokens: int, sequences: int) -> dict[Phase, int]:
        taken = {p: needs.workspace(p, tokens, recompute, card) for p in PHASES}
        return {p: room[p] - taken[p] - (p in cached) * sequences * needs.sequence for p in PHASES}

    before = left(least, 1)
    lacking: list[tuple[int, Phase]] = [(-before[p], p) for p in PHASES]
    if max(lacking)[0] > 0:
        return None, max(lacking)
    wanted = max(least, ROW) if recompute and token_budget is None else least
    spare = min((left(wanted, 1)[p] for p in cached), default=0)
    sequences = min(needs.requests, 1 + max(0, spare) // needs.sequence) if needs.sequence else 0
    tokens, beyond = least, max(least, ROW if token_budget is None else 0) + 1
    while beyond - tokens > 1:  # the most that fit
        middle = (tokens + beyond) // 2
        fits = min(left(middle, sequences).values()) >= 0
        tokens, beyond = (middle, beyond) if fits else (tokens, middle)
    return Plan(needs, card, moved, recompute, token_budget or tokens, sequences * needs.sequence), max(lacking)


def remedies(needs: Needs, offload: Offload, recompute: bool | str, token_budget: Tokens) -> str:
    """What to change where nothing fits."""
    ways = ["shorten max_completion_length"]
    ways += ["offload auto"] if offload == "never" else []
    ways += ["gradient_checkpointing auto"] if recompute is False else []
    ways += ["token_budget auto"] if token_budget is not None else []
    return "; ".join([*ways, *needs.advice]) + "; or take a larger card"
