"""Which image goes to training and which is held back: stratified, seeded, and never one group on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

from flawmask.files import sha256

SplitMethod = Literal["shuffle", "integer program"]


@dataclass(frozen=True)
class Member:
    """What the split has to know of an image: the group it must stay with, and the type it counts for."""

    group: str
    defect_type: str


def split_groups(members: Sequence[Member], train_ratio: float, seed: int) -> frozenset[str]:
    """Return the groups that go to training; all others are held back for validation.

    A group is never divided. Every type with two groups or more appears on both sides, the group of a type that
    has only one goes to training, and within that the number of training images of each type is as near to
    `train_ratio` of them as the groups allow. Among the divisions that are equally near, `seed` draws one.

    Where every image is a group of its own, each type is shuffled and cut, which no version of a library changes. Else
    this is a small integer program, solved exactly: minimise the distance to the wanted counts, summed over types.
    Where wishes contradict each other (groups that span types), being on both sides goes before the ratio.

    Args:
        members: one per image.
        train_ratio: between 0 and 1, exclusive.
        seed: 0 is a seed like any other.
    """
    if split_method(members) == "shuffle":
        return _shuffled(members, train_ratio, seed)
    from scipy.optimize import Bounds, milp

    groups = sorted({member.group for member in members})
    types = sorted({member.defect_type for member in members})
    counts = np.zeros((len(types), len(groups)))
    group_index = {group: column for column, group in enumerate(groups)}
    for member in members:
        counts[types.index(member.defect_type), group_index[member.group]] += 1
    held = counts > 0
    wanted = np.floor(train_ratio * counts.sum(axis=1) + 0.5)

    # Variables: a group is in training (0/1), then per type the distance to the wanted count, and whether it is
    # missing where it should be. Small random costs choose among equally good divisions; they sum to less than 1. They
    # lie around 0 and grow with the group, or few large groups would be cheaper than many small ones.
    draw = (np.random.default_rng(seed).random(len(groups)) - 0.5) * counts.sum(axis=0) / len(members)
    cost = np.concatenate((draw, np.ones(len(types)), np.full(len(types), len(members) + 1.0)))
    constraints = []
    distance, missing = np.eye(len(types)), np.eye(len(types))
    nothing = np.zeros((len(types), len(types)))
    constraints.append(_at_least(np.hstack((counts, distance, nothing)), wanted))
    constraints.append(_at_least(np.hstack((-counts, distance, nothing)), -wanted))
    several = held.sum(axis=1) >= 2
    in_training = np.hstack((held, nothing, missing)).astype(float)
    constraints.append(_at_least(in_training, np.ones(len(types))))
    held_back = np.hstack((-held.astype(float), nothing, missing))[several]
    constraints.append(_at_least(held_back, 1 - held.sum(axis=1)[several]))
    whole = np.concatenate((np.ones(len(groups), int), np.zeros(len(types), int), np.ones(len(types), int)))
    upper = np.concatenate((np.ones(len(groups)), np.full(len(types), np.inf), np.ones(len(types))))
    bounds = Bounds(np.zeros(len(cost)), upper)
    # Without presolve: that of HiGHS prints lines of its own here and there, and is no faster. But without it, HiGHS
    # gives up on one division of few images in two hundred ("Solve error", SciPy 1.17).
    for presolve in (False, True):
        solution = milp(
            cost,
            integrality=whole,
            bounds=bounds,
            constraints=constraints,
            options={"mip_rel_gap": 0, "presolve": presolve},
        )
        if solution.x is not None:
            return frozenset(group for group, chosen in zip(groups, solution.x, strict=False) if chosen > 0.5)
    raise RuntimeError(f"the split has no solution, which cannot be: {solution.message}")


def split_method(members: Sequence[Member]) -> SplitMethod:
    """Return how `split_groups` divides images: by a shuffle where every one is a group of its own."""
    return "shuffle" if len({member.group for member in members}) == len(members) else "integer program"


def _shuffled(members: Sequence[Member], train_ratio: float, seed: int) -> frozenset[str]:
    """Return the groups of one image each that go to training: of each type the first in an order that the seed draws.

    SHA-256 draws it, so that it depends on the images and the seed alone.
    """
    training: set[str] = set()
    for kind in {member.defect_type for member in members}:
        groups = [member.group for member in members if member.defect_type == kind]
        groups.sort(key=lambda group: sha256(f"{seed} {group}".encode()))
        wanted = int(train_ratio * len(groups) + 0.5)
        training.update(groups[: min(max(wanted, 1), max(len(groups) - 1, 1))])
    return frozenset(training)


def fold_groups(members: Sequence[Member], folds: int, seed: int) -> list[frozenset[str]]:
    """Return the groups of each fold: every group is in exactly one, and each fold holds about its share of every type.

    Folds are held back one after the other with `split_groups`, each from what is left.

    Args:
        members: one per image.
        folds: 2 or more, at most as many as there are groups.
        seed: 0 is a seed like any other.
    """
    found: list[frozenset[str]] = []
    rest = list(members)
    for left in range(folds, 1, -1):
        staying = split_groups(rest, 1 - 1 / left, seed)
        found.append(frozenset(member.group for member in rest) - staying)
        rest = [member for member in rest if member.group in staying]
    return [*found, frozenset(member.group for member in rest)]


def _at_least(matrix: np.ndarray, lower: np.ndarray) -> "LinearConstraint":
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    return LinearConstraint(csr_array(matrix), lower, np.inf)
