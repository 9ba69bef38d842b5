"""The runs of a comparison: their directories, short distinct names, and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lightning_landscape.geometry.checks import check_mapping, quoted, shown
from lightning_landscape.report.run import Run, read_run
from lightning_landscape.training.records import HISTORY_FILE


def read_runs(runs: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Run]:
    """Name -> run, in the given order, with the last picture of each kind.

    Raises:
        FileNotFoundError, ValueError, TypeError: see :func:`lightning_landscape.compare`.
    """
    if isinstance(runs, (str, Path)):
        raise TypeError(
            f"compare(runs={str(runs)!r}): expected several log directories, as a list or as a "
            f"mapping from names to directories; for a single run there is "
            f"lightning_landscape.report"
        )
    if not isinstance(runs, Iterable):
        raise TypeError(
            f"{quoted('compare', 'runs', runs)}: expected several log directories, as a list or as "
            f"a mapping from names to directories"
        )
    if not runs:
        raise ValueError(f"compare(runs={runs!r}): expected at least one log directory")
    if isinstance(runs, Mapping):
        return {str(name): _read(folder) for name, folder in runs.items()}
    read = [_read(folder) for folder in runs]
    folders = [run.folder.resolve() for run in read]
    for folder, count in Counter(folders).items():
        if count > 1:
            raise ValueError(
                f"compare(runs=[...]): {folder} is given {count} times; pass each run once, or a "
                f"mapping from names to directories"
            )
    return dict(zip(short_names(folders), read, strict=True))


def _read(folder: str | Path) -> Run:
    if not isinstance(folder, (str, Path)):
        raise TypeError(
            f"compare(runs=...): got {shown(folder)}; expected the log directory of a run"
        )
    try:
        return read_run(Path(folder), most=1)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"compare(runs=...): {error}; pass a directory that holds {HISTORY_FILE}, such as "
            f"trainer.log_dir"
        ) from error
    except ValueError as error:
        raise ValueError(f"compare(runs=...): {error}") from error


def short_names(folders: Sequence[Path]) -> list[str]:
    """The parts by which the paths differ.

    Example:
        >>> short_names([Path("/logs/adam/version_0"), Path("/logs/sgd/version_0")])
        ['adam', 'sgd']
        >>> short_names([Path("/logs/adam/version_0"), Path("/logs/sgd/version_1")])
        ['adam/version_0', 'sgd/version_1']
    """
    if len(folders) == 1:
        return ["/".join(folders[0].parts[-2:])]
    parts = [folder.parts for folder in folders]
    while min(map(len, parts)) > 1 and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while min(map(len, parts)) > 1 and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return ["/".join(one) for one in parts]


def groups_of(
    names: Sequence[str], groups: Mapping[str, str] | None, group_by: str | None
) -> dict[str, str]:
    """Run -> group; empty without groups.

    Raises:
        ValueError: both arguments are given, or ``groups`` and the runs do not match.
    """
    if groups is not None and group_by is not None:
        raise ValueError(
            f"compare(groups=..., group_by={group_by!r}): expected one of the two, or none"
        )
    if group_by is not None:
        expected = (
            f"{quoted('compare', 'group_by', group_by)}: expected the separator behind the group"
        )
        if not isinstance(group_by, str):
            raise TypeError(f"{expected}, e.g. '/'")
        if not group_by:
            raise ValueError(f"{expected}, e.g. '/'")
        return {name: name.rpartition(group_by)[0] or name for name in names}
    if groups is None:
        return {}
    check_mapping("compare", "groups", groups, "a mapping from run to group, or None")
    for name in names:
        if name not in groups:
            raise ValueError(
                f"compare(groups=...): it lacks the run {name!r}; name the group of every run"
            )
    if unknown := [name for name in groups if name not in names]:
        raise ValueError(
            f"compare(groups=...): there is no run {unknown[0]!r}; the runs are "
            f"{', '.join(map(repr, names))}: name each of them, and no other"
        )
    return {name: str(groups[name]) for name in names}


def chosen_keys(
    found: Sequence[str], keys: str | Sequence[str] | None, argument: str = "keys"
) -> list[str]:
    """The keys that match the requested names or patterns.

    Raises:
        ValueError: no run has a requested key; the message lists those there are.
    """
    if keys is None:
        return list(found)
    chosen: dict[str, None] = {}
    patterns = [keys] if isinstance(keys, str) else keys
    if not isinstance(patterns, Iterable) or not all(isinstance(key, str) for key in patterns):
        raise TypeError(
            f"{quoted('compare', argument, keys)}: expected names of scalars or patterns, e.g. "
            f"'sharpness/*', or None for all"
        )
    for pattern in patterns:
        fitting = [key for key in found if key == pattern or fnmatchcase(key, pattern)]
        if not fitting:
            raise ValueError(
                f"compare({argument}=...): no run has {pattern!r}; there are "
                f"{', '.join(map(repr, found)) or 'no scalars at all'}: pass what is there"
            )
        chosen.update(dict.fromkeys(fitting))
    return list(chosen)
