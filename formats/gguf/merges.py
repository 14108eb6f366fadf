"""What order a vocabulary merges in: by a list of pairs, or by its tokens' scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

Pair = tuple[str, str]


def scores_of(pairs: Iterable[Pair]) -> dict[str, float]:
    """Returns scores of the tokens that merges make, higher for those that are made earlier."""
    made = dict.fromkeys(left + right for left, right in pairs)
    return {name: -float(index) for index, name in enumerate(made)}


def differing(vocabulary: Mapping[str, int], pairs: Sequence[Pair], added: Set[str]) -> str | None:
    """Returns a token that scores merge otherwise than a list of pairs does, or None.

    By scores any two neighbours are merged whose text together is a token. A list says the same if it has every
    such pair, and all pairs of one token before those of the next.
    """
    known, last = set(pairs), ""
    finished: set[str] = set()
    for left, right in pairs:
        made = left + right
        if made != last:
            if made in finished:
                return made
            finished.add(last)
            last = made
    for name in vocabulary:
        if name in added or (name.startswith("<0x") and len(name) == 6):
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in known:
                return name
    return None


def unreached(vocabulary: Mapping[str, int], pairs: Sequence[Pair], added: Set[str]) -> int:
    """Returns how many tokens of a byte-level vocabulary their own text is not merged to."""
    from tokenizers.models import BPE

    merger = BPE(vocab=dict(vocabulary), merges=list(pairs))
    return sum(name not in added and len(merger.tokenize(name)) != 1 for name in vocabulary)


def pairs_of(scores: Mapping[str, float]) -> list[Pair]:
    """Returns the merges of a vocabulary that merges by scores: the highest score first, then the leftmost cut."""
    made = []
    for order, (name, score) in enumerate(scores.items()):
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in scores and right in scores:
                made.append((-score, order, cut, left, right))
    made.sort()
    return [(left, right) for *_, left, right in made]
