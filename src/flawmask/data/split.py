"""Split images into training and validation: stratified by type, seeded, and without dividing a group."""

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
    """The data of an image that the split needs: its group, which stays together, and its defect type."""

    group: str
    defect_type: str


def split_groups(members: Sequence[Member], train_ratio: float, seed: int) -> frozenset[str]:
    """Return the groups for training; all other groups are for validation.

    A group is never divided. A type with two or more groups appears in both splits; the only group of a type goes to
    training. Under these rules, the number of training images of each type is as close to `train_ratio` as the groups
    allow. `seed` draws one of the equally good splits.

    If every image is its own group, each type is shuffled and cut. The result does not depend on library versions.
    Otherwise a small integer program is solved exactly: it minimises the distance to the wanted counts, summed over the
    types. If groups span types and the rules conflict, a type's presence in both splits has priority over the ratio.

    Args:
        members: one for each image.
        train_ratio: between 0 and 1, exclusive.
        seed: any number from 0 on.
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

    # The variables are: for each group, whether it is in training (0 or 1); for each type, the distance to the wanted
    # count; and for each type, whether it is missing in a split. Small random costs, which sum to less than 1, choose
    # among equally good splits. They are centred on 0 and proportional to the group's size; otherwise a few large
    # groups would be cheaper than many small ones.
    random_cost = (np.random.default_rng(seed).random(len(groups)) - 0.5) * counts.sum(axis=0) / len(members)
    cost = np.concatenate((random_cost, np.ones(len(types)), np.full(len(types), len(members) + 1.0)))
    constraints = []
    distance, missing = np.eye(len(types)), np.eye(len(types))
    zeros = np.zeros((len(types), len(types)))
    constraints.append(_at_least(np.hstack((counts, distance, zeros)), wanted))
    constraints.append(_at_least(np.hstack((-counts, distance, zeros)), -wanted))
    several = held.sum(axis=1) >= 2
    in_training = np.hstack((held, zeros, missing)).astype(float)
    constraints.append(_at_least(in_training, np.ones(len(types))))
    in_validation = np.hstack((-held.astype(float), zeros, missing))[several]
    constraints.append(_at_least(in_validation, 1 - held.sum(axis=1)[several]))
    is_integer = np.concatenate((np.ones(len(groups), int), np.zeros(len(types), int), np.ones(len(types), int)))
    upper = np.concatenate((np.ones(len(groups)), np.full(len(types), np.inf), np.ones(len(types))))
    bounds = Bounds(np.zeros(len(cost)), upper)
    # First try without presolve: the presolve of HiGHS sometimes prints lines, and is not faster. But without it, HiGHS
    # gives up on one in two hundred splits of few images ("Solve error", SciPy 1.17).
    for presolve in (False, True):
        solution = milp(
            cost,
            integrality=is_integer,
            bounds=bounds,
            constraints=constraints,
            options={"mip_rel_gap": 0, "presolve": presolve},
        )
        if solution.x is not None:
            return frozenset(group for group, chosen in zip(groups, solution.x, strict=False) if chosen > 0.5)
    raise RuntimeError(f"the split has no solution, which cannot be: {solution.message}")


def split_method(members: Sequence[Member]) -> SplitMethod:
    """Return the method of `split_groups`: a shuffle if every image is a group of its own."""
    return "shuffle" if len({member.group for member in members}) == len(members) else "integer program"


def _shuffled(members: Sequence[Member], train_ratio: float, seed: int) -> frozenset[str]:
    """Return the groups for training if each group is one image: the first ones of each type, in a random order.

    The order comes from SHA-256, so it depends only on the images and the seed.
    """
    training: set[str] = set()
    for kind in {member.defect_type for member in members}:
        groups = [member.group for member in members if member.defect_type == kind]
        groups.sort(key=lambda group: sha256(f"{seed} {group}".encode()))
        wanted = int(train_ratio * len(groups) + 0.5)
        training.update(groups[: min(max(wanted, 1), max(len(groups) - 1, 1))])
    return frozenset(training)


def fold_groups(members: Sequence[Member], folds: int, seed: int) -> list[frozenset[str]]:
    """Return the groups of each fold. Every group is in exactly one fold, and each fold has its share of each type.

    The folds are taken one after the other with `split_groups` from the images that remain.

    Args:
        members: one for each image.
        folds: 2 or more, but not more than there are groups.
        seed: any number from 0 on.
    """
    by_fold: list[frozenset[str]] = []
    remaining = list(members)
    for folds_left in range(folds, 1, -1):
        kept = split_groups(remaining, 1 - 1 / folds_left, seed)
        by_fold.append(frozenset(member.group for member in remaining) - kept)
        remaining = [member for member in remaining if member.group in kept]
    return [*by_fold, frozenset(member.group for member in remaining)]


def _at_least(matrix: np.ndarray, lower: np.ndarray) -> "LinearConstraint":
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    return LinearConstraint(csr_array(matrix), lower, np.inf)
