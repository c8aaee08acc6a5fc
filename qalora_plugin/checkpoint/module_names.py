"""Names of modules on disk and in a model, as pairs of prefixes.

An adapter records them, shortened, so that merging, which sees no model, finds the tensors that its A and B belong to.
The rules by which transformers renames are in :mod:`qalora_plugin.integrations.transformers.naming`.
"""

import re

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a linear, by its name on disk, is one of a layer's experts."""
    return bool(_EXPERT.search(name))


def shorten(names: dict[str, str]) -> dict[str, str]:
    """Pairs of full names as pairs of prefixes, without what is named alike at the end; ``{}`` if nothing is renamed.

    Args:
        names: name in the model → name on disk.
    """
    if all(name == stored for name, stored in names.items()):
        return {}
    prefixes = dict(_different_part(name, stored) for name, stored in names.items())
    same = all(stored_name(name, prefixes) == stored for name, stored in names.items())
    return prefixes if same else dict(names)


def stored_name(name: str, prefixes: dict[str, str]) -> str:
    """The name on disk of a module of the model, by what :func:`shorten` returned (the longest prefix counts)."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        prefix = ".".join(parts[:end])
        if prefix in prefixes:
            return ".".join(filter(None, (prefixes[prefix], *parts[end:])))
    return name


def _different_part(name: str, stored: str) -> tuple[str, str]:
    ours, theirs = name.split("."), stored.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join(ours), ".".join(theirs)
