"""Which plan is taken for a GPU, by arithmetic alone: what is moved and recomputed so that enough fits, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from nanorlhf.errors import UsageError
from nanorlhf.memory.plan import MARGIN, MOVES, PHASES, Needs, Offload, Phase, Plan, Tokens, Unit
from nanorlhf.system.device import CONTEXT, GIB

ROW = 16384  # tokens in a micro-batch: more are no faster
LONG = 8192  # with fewer a large card waits for the CPU to ask, and something is moved for the sake of more

Try = tuple[Plan | None, tuple[int, Phase]]  # or by how many bytes it fails, and in which phase


def make_plan(
    needs: Needs,
    card: int,
    offload: Offload = "auto",
    recompute: bool | Literal["auto"] = "auto",
    token_budget: Tokens = None,
) -> Plan:
    """The plan that moves least if much fits, else the one with most cache; a UsageError if none works.

    Gradient checkpointing costs more time than moving anything, so it comes last, and for no more layers than it must.
    """
    counts = {"auto": (0, needs.layers), True: (needs.layers,), False: (0,)}[recompute]
    ways = list(ways_to_move(needs, offload))
    tries = {(n, moved): attempt(needs, card, moved, n, token_budget) for n in counts for moved in ways}
    plans = [plan for plan, _ in tries.values() if plan]
    if not plans:
        raise misfit(needs, card, [lacking for _, lacking in tries.values()], offload, recompute, token_budget)
    plan = choose(plans)
    why = reasons(plan, tries)
    if plan.recompute and recompute == "auto":
        plan = lightened(plan, token_budget)
        why.append(
            f"if no layer were recomputed, {lacks(*tries[0, ways[-1]])}, so {plan.recompute} of {needs.layers} are"
        )
    return replace(plan, reasons=tuple(why))


def choose(plans: list[Plan]) -> Plan:
    """The first with enough cache and long rows; failing that, with enough cache and the longest, or most cache."""
    busy = [plan for plan in plans if plan.busy]
    if not busy:
        return max(plans, key=lambda plan: plan.cache)
    alike = [plan for plan in busy if plan.recompute == busy[0].recompute]
    return next((plan for plan in alike if plan.tokens >= LONG), max(alike, key=lambda plan: plan.tokens))


def lightened(plan: Plan, token_budget: Tokens) -> Plan:
    """The same with fewer layers recomputed, as few as leave its cache as it is and its rows long."""
    for again in range(1, plan.recompute):
        lighter, _ = attempt(plan.needs, plan.card, plan.moved, again, token_budget)
        if lighter and lighter.cache >= plan.cache and lighter.tokens >= min(plan.tokens, LONG):
            return lighter
    return plan


def reasons(plan: Plan, tries: dict[tuple[int, frozenset[Unit]], Try]) -> list[str]:
    """Why the last unit that is moved is, in a sentence, if it was for the plan to choose."""
    units: list[Unit] = [unit for unit in MOVES if unit in plan.moved]
    others = units[:-1]
    without = tries.get((plan.recompute, frozenset(others)))
    if not units or without is None:
        return []
    if not others:
        return [f"if nothing moved, {lacks(*without)}, so the {units[-1]} moves"]
    return [f"if only {', '.join(others)} moved, {lacks(*without)}, so the {units[-1]} moves too"]


def lacks(plan: Plan | None, lacking: tuple[int, Phase]) -> str:
    """The reason against a plan that was not taken."""
    missing, phase = lacking
    if plan is None:
        return f"the {phase} phase would lack {missing / GIB:.1f} GiB"
    if not plan.busy:
        return f"only {plan.sequences} completions of full length could decode at once"
    return f"rows of {plan.tokens:,} tokens would be too short to fill the card"


def misfit(
    needs: Needs,
    card: int,
    lacking: list[tuple[int, Phase]],
    offload: Offload,
    recompute: bool | str,
    token_budget: Tokens,
) -> UsageError:
    """The error to raise if no plan works."""
    missing, phase = min(lacking)
    one = " with one completion of full length" if phase == "generate" else ""
    return UsageError(
        f"the {phase} phase{one} needs {(card + missing) / GIB:.1f} GiB for samples of {needs.longest:,} tokens, "
        f"{missing / GIB:.1f} GiB more than the card has; try: {remedies(needs, offload, recompute, token_budget)}"
    )


def ways_to_move(needs: Needs, offload: Offload) -> Iterator[frozenset[Unit]]:
    """Nothing, then one unit more each time; or only the first or the last of these."""
    units = needs.units
    counts = {"auto": range(len(units) + 1), "always": [len(units)], "never": [0]}[offload]
    return (frozenset(units[:n]) for n in counts)


def attempt(needs: Needs, card: int, moved: frozenset[Unit], again: int, token_budget: Tokens) -> Try:
    """The plan if these units are moved and so many layers recomputed."""
    room: dict[Phase, int] = {
        p: card - CONTEXT - MARGIN - sum(r.bytes for r in needs.present(p, moved)) for p in PHASES
    }
    cached: list[Phase] = [p for p in PHASES if any(r.unit == "engine" for r in needs.present(p, moved))]
    least = max(needs.longest, 0 if token_budget is None else token_budget)

    def left(tokens: int, sequences: int) -> dict[Phase, int]:
        taken = {p: needs.workspace(p, tokens, again, card) for p in PHASES}
        return {p: room[p] - taken[p] - (p in cached) * sequences * needs.sequence for p in PHASES}

    before = left(least, 1)
    lacking: list[tuple[int, Phase]] = [(-before[p], p) for p in PHASES]
    if max(lacking)[0] > 0:
        return None, max(lacking)
    wanted = max(least, ROW) if again and token_budget is None else least
    spare = min((left(wanted, 1)[p] for p in cached), default=0)
    sequences = min(needs.requests, 1 + max(0, spare) // needs.sequence) if needs.sequence else 0
    tokens, beyond = least, max(least, ROW if token_budget is None else 0) + 1
    while beyond - tokens > 1:  # the most that fit
        middle = (tokens + beyond) // 2
        fits = min(left(middle, sequences).values()) >= 0
        tokens, beyond = (middle, beyond) if fits else (tokens, middle)
    return Plan(needs, card, moved, again, token_budget or tokens, sequences * needs.sequence), max(lacking)


def remedies(needs: Needs, offload: Offload, recompute: bool | str, token_budget: Tokens) -> str:
    """Options to change if nothing fits."""
    ways = ["shorten max_completion_length"]
    ways += ["offload auto"] if offload == "never" else []
    ways += ["gradient_checkpointing auto"] if recompute is False else []
    ways += ["token_budget auto"] if token_budget is not None else []
    return "; ".join([*ways, *needs.advice]) + "; or take a larger card"
