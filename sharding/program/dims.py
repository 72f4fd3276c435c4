"""The named dimensions of a program, from how its factors are used and where they stand."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from .jaxpr import scan_parts
from .labels import label_votes, unique
from .program import Argument, Dim, Place, Program
from .resolve import Resolver, Use


def families(count: int, kin: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    """Return the family of each dim: those that are kin, through their major factors, share one."""
    parent = list(range(count))

    def find(dim: int) -> int:
        while parent[dim] != dim:
            parent[dim] = parent[parent[dim]]
            dim = parent[dim]
        return dim

    for left, right in kin:
        if left and right:
            a, b = sorted((find(left[0]), find(right[0])))
            parent[b] = a
    numbers: dict[int, int] = {}
    return [numbers.setdefault(find(dim), len(numbers)) for dim in range(count)]


def leading_batch(arguments: Sequence[Argument], read: Collection[int]) -> tuple[int, ...]:
    """Return the dims that most arrays of the data lead with, of those that the program has `read` if any.

    Ties go to the most elements, then to the first. Dims that parameters have do not count: a table that
    comes with the data is no batch. Those that come second in other data (the sequence of a mask) only do
    where there is nothing else.
    """
    in_parameters = {d for a in arguments if a.is_parameter for dim in a.dims for d in dim}
    data = [a for a in arguments if a.is_data and a.dims]
    data = [a for a in data if a.index in read] or data
    second = {d for a in data for dim in a.dims[1:] for d in dim}
    votes: Counter[tuple[int, ...]] = Counter()
    elements: Counter[tuple[int, ...]] = Counter()
    for argument in data:
        lead = argument.dims[0]
        if lead and not in_parameters.intersection(lead):
            votes[lead] += 1
            elements[lead] += math.prod(argument.shape)
    first = [lead for lead in votes if not second.intersection(lead)]
    return max(first or votes, key=lambda lead: (votes[lead], elements[lead]), default=())


def batch_rows(program: Program) -> int:
    """Return the rows of the batch, 1 if no array of the data has any."""
    data = [a for a in program.arguments if a.is_data and a.shape]
    leads = [a.shape[0] for a in data if a.dims[0] == program.batch_dims] or [a.shape[0] for a in data]
    return max(leads, key=leads.count, default=1)


def rows_of_a_parameter(program: Program) -> str | None:
    """Say which array of the data has a row for each entry of a parameter; None where there is none."""
    for one in program.arguments:
        if not one.is_data or not one.shape or one.shape[0] == 1:
            continue
        for other in program.parameters:
            if any(set(one.dims[0]).intersection(dims) for dims in other.dims):
                rows = f"{one.path or 'the batch'} {one.shape}"
                return f"{rows} has a row for each entry of parameter {other.path} {other.shape}"
    return None


def rows_further_on(program: Program, *, swapped: bool = False) -> str | None:
    """Say which array of the data leads with what another that leads with the batch has further on.

    If `swapped`, only one that has the batch further on itself, as time before rows beside rows before time.
    """
    data = [a for a in program.arguments if a.is_data and a.shape]
    for one in (a for a in data if a.dims[0] and a.dims[0] == program.batch_dims):
        for other in data:
            if other.dims[0] and other.shape[0] > 1 and other.dims[0] in one.dims[1:]:
                if swapped and one.dims[0] not in other.dims[1:]:
                    continue
                at = one.dims.index(other.dims[0], 1)
                return (
                    f"{one.path} {one.shape} is read as {one.shape[0]} rows, and {other.path} {other.shape} "
                    f"leads with dimension {at} of it: rows come first in each array"
                )
    return None


def rows_in_turns(program: Program) -> str | None:
    """Say which array of the data leads with what a loop takes one after another, carrying its rows along."""
    data = [a for a in program.arguments if a.is_data and a.shape and a.dims[0] == program.batch_dims]
    for equation in program.equations():
        if equation.primitive != "scan" or not program.batch_dims:
            continue
        parts = scan_parts(equation.eqn)
        start = parts.num_consts + parts.num_carry
        taken = {dims[0] for dims in equation.ins[start:] if dims}
        carried = {dims[0] for dims in equation.ins[parts.num_consts : start] if dims and dims[0]}
        if program.batch_dims not in taken:
            continue
        for one in data:
            if further := [n for n, dims in enumerate(one.dims) if n and dims in carried]:
                return (
                    f"{one.path or 'the batch'} {one.shape} is read as {one.shape[0]} rows, which the loop "
                    f"at {equation.where} takes one after another, carrying an array that leads with "
                    f"dimension {further[0]} of it: rows come first in each array"
                )
    return None


def with_names_of_rows(
    arguments: Sequence[Argument], batch: tuple[int, ...], names: Sequence[str]
) -> tuple[Argument, ...]:
    """Return `arguments`, the data that lead with the dims `batch` under `names`, as far as they have none.

    Data that meet no other, such as the ids of rows, lead with the batch if they have as many rows. What
    stands second in arrays of fewer dimensions may stand further on in others: a bias of attention for each
    row has its heads before the sequence. A dimension of 1, there to be broadcast, is no sequence. Where all
    data are of one row, which is no dim, they have a sequence all the same.
    """
    single = not batch and all(a.shape[0] == 1 for a in arguments if a.is_data and a.shape)
    leading = {a.shape[0] for a in arguments if batch and a.is_data and a.dims[:1] == (batch,)}
    met = Counter(d for a in arguments for dims in {*a.dims} for d in dims)

    def named(argument: Argument) -> Argument:
        if not argument.is_data or not argument.shape or any(argument.names):
            return argument
        lead = argument.dims[0]
        alone = argument.shape[0] in leading and all(met[d] == 1 for d in lead)
        if (lead != batch and not alone) or (not lead and not single):
            return argument
        at = _second_place(argument, arguments, batch)
        own = (*(names[:1] if lead else (None,)), *(None,) * (at - 1), *names[1:], *argument.names)
        held = zip(own, argument.shape, strict=False)
        own = tuple(name if n == 0 or size > 1 else None for n, (name, size) in enumerate(held))
        return dataclasses.replace(argument, names=own)

    return tuple(map(named, arguments)) if names else tuple(arguments)


def _second_place(argument: Argument, others: Sequence[Argument], batch: tuple[int, ...]) -> int:
    """Return which dimension of an array is the one that arrays of fewer dimensions have second, or 1."""
    rank = len(argument.dims)
    shorter = (a.dims for a in others if a.is_data and a.dims[:1] == (batch,) and 1 < len(a.dims) < rank)
    second = {dims[1] for dims in shorter if dims[1]}
    if rank < 3 or argument.dims[1] in second:
        return 1
    return next((n for n in range(2, rank) if argument.dims[n] in second), 1)


def build(
    resolver: Resolver,
    arguments: Sequence[Argument],
    family: Sequence[int],
    batch: tuple[int, ...],
    stacked: Collection[int] = (),
) -> tuple[Dim, ...]:
    """Put together what is known of every dim; `stacked` are those that parameters are stacked along."""
    places: dict[int, list[Place]] = defaultdict(list)
    in_parameters: set[int] = set(stacked)
    in_data: set[int] = set()
    for argument in arguments:
        for dimension, composition in enumerate(argument.dims):
            if argument.is_parameter:
                in_parameters.update(composition)
            elif argument.is_data:
                in_data.update(composition)
            for part, dim in enumerate(composition):
                place = Place(argument=argument.index, path=argument.path, dimension=dimension, part=part)
                places[dim].append(place)
    conflicts: dict[int, list] = defaultdict(list)
    for conflict in resolver.conflicts:
        conflicts[conflict.dim].append(conflict)
    alone, part = label_votes(arguments)
    wanted: list[tuple[str, int]] = []
    labels: list[tuple[str, ...]] = []
    for dim, (size, use) in enumerate(zip(resolver.sizes, resolver.uses, strict=True)):
        found = [name for votes in (alone, part) for name, _ in votes.get(dim, Counter()).most_common()]
        labels.append(tuple(dict.fromkeys(found)))
        made_up = "batch" if dim in batch else "layers" if use.scanned and dim in in_parameters else ""
        wanted.append((found[0] if found else made_up, size))
    names = unique(wanted)
    return tuple(
        Dim(
            id=dim,
            name=names[dim],
            size=size,
            labels=labels[dim],
            family=family[dim],
            places=tuple(places[dim]),
            contracted=use.contracted,
            scanned=use.scanned,
            stacked=use.scanned and dim in in_parameters,
            batch_like=dim in in_data and dim not in in_parameters,
            whole=_why_whole(use, size),
            whole_at=tuple(index for index, _ in use.whole_at),
            conflicts=tuple(conflicts[dim]),
        )
        for dim, (size, use) in enumerate(zip(resolver.sizes, resolver.uses, strict=True))
    )


def _why_whole(use: Use, size: int) -> str | None:
    if size == 0:
        return "it is empty"
    if use.useful:
        return None
    if use.windowed_at:
        return f"it is the window of {use.windowed_at[0][1]}"
    if use.whole_at:
        return f"{use.whole_at[0][1]} needs it whole, and nothing else uses it"
    return None
