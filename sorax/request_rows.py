"""Where the tokens of requests stand: end to end as they are denoised, and in packed rows as the network sees them.

Both branches of guidance are segments of the same rows: a request has two, its prompt's and its negative prompt's, each
with its own caption. So rows are as full as twice as many requests make them, and fewer where a request fits twice in
one.

Legend: G groups, T tokens of a group's requests end to end, R rows of a group; N tokens, M text slots of a row.
"""

import dataclasses

import numpy as np

from data_pipelines.text_tokens import PAD_ID
from sorax.patchify import positions

GROUP_TOKENS = 8192  # of requests that are denoised together on a device, both branches apart; one may have more
ROW_TOKENS = 512  # rows are at most as long, or twice as long as the longest request,
LONG_ROW = 16384  # but no longer than this unless it is
ROW_TEXT = 2048  # text slots of a row, or as many as the longest caption has
SHORT_ROW = 96  # rows are not made shorter than this to be fuller
GOOD_FILL = 0.98  # a row length that is as good as any


@dataclasses.dataclass(frozen=True)
class Item:
    """A request as it is packed: shape (t, h, w) of its patches, and the caption int [L] of each of its branches."""

    shape: tuple[int, int, int]
    captions: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return int(np.prod(self.shape))


def best_fit(sizes, texts, room: int, room_text: int) -> list[list[int]]:
    """Rows, lists of places: each thing, the largest first, is put in the fullest row in which it fits.

    sizes, texts: int [n], none above the room for it. (Best-fit decreasing; Johnson 1973.)
    """
    sizes, texts = np.asarray(sizes), np.asarray(texts)
    rows, left = [], np.zeros((0, 2), int)
    for place in np.lexsort((np.arange(len(sizes)), -texts, -sizes)).tolist():
        need = np.array([sizes[place], texts[place]])
        fits = np.flatnonzero((left >= need).all(axis=1))
        if len(fits):
            row = fits[left[fits, 0].argmin()]
        else:
            row, left = len(rows), np.concatenate([left, [[room, room_text]]])
            rows.append([])
        rows[row].append(place)
        left[row] -= need
    return rows


def groups_of(tokens, most: int = GROUP_TOKENS) -> list[list[int]]:
    """Requests that are denoised together, of about as many tokens in every group: places in ascending order."""
    groups = [[] for _ in best_fit(tokens, np.zeros(len(tokens), int), max(most, max(tokens)), 0)]
    load = np.zeros(len(groups), int)
    for place in np.argsort(-np.asarray(tokens), kind="stable").tolist():
        groups[load.argmin()].append(place)
        load[load.argmin()] += tokens[place]
    return sorted(sorted(group) for group in groups)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Rows:
    """The rows of groups of requests, of some of their branches; all groups have equal shapes.

    items: of all requests. groups: places in items. branches: which captions, such as (0,) or (0, 1). multiple: of N.

    `segments` is the largest number of segments in a row. See `arrays`.
    """

    def __init__(self, items, groups, branches, multiple: int = 16):
        self.items, self.groups, self.branches = items, groups, branches
        self.T = round_up(max(sum(items[i].tokens for i in group) for group in groups), 64)
        longest = max(item.tokens for item in items)
        # Captions take L + 1 slots: one that is empty stands for all that they leave unused.
        self._members = [[(i, b) for i in group for b in branches] for group in groups]
        sizes = [[items[i].tokens for i, _ in members] for members in self._members]
        texts = [[len(items[i].captions[b]) + 1 for i, b in members] for members in self._members]
        room_text = max(ROW_TEXT, max(map(max, texts)))
        best = None
        for N in _lengths(longest, max(map(sum, sizes)), multiple):
            packed = [best_fit(*both, N, room_text) for both in zip(sizes, texts)]
            R = max(map(len, packed))
            if best is None or best[0] > R * N:
                best = R * N, R, N, packed
            if sum(map(sum, sizes)) >= GOOD_FILL * len(groups) * R * N:
                break
        _, self.R, self.N, self._rows = best
        per_row = [(len(row), sum(text[k] for k in row)) for rows, text in zip(self._rows, texts) for row in rows]
        self.segments = max(count for count, _ in per_row)
        self.M = round_up(max(slots for _, slots in per_row), 32)

    def arrays(self, some) -> dict[str, np.ndarray]:
        """What the network is told of the rows of some groups (their places), but for the tokens themselves.

        Returns:
            source int32 [G, R * N]: the token, of T, that stands there, 0 where there is padding.
            places int32 [G, branches, T]: where, of R * N, each token of each branch stands; 0 where there is none.
            positions [G * R, N, 3], segment_ids [G * R, N], text_tokens [G * R, M], text_segment_ids [G * R, M]: as
            `data_pipelines.rows` has them.
        """
        R, N, M, G = self.R, self.N, self.M, len(some)
        shapes = dict(source=(G, R * N), places=(G, len(self.branches), self.T), positions=(G, R, N, 3),
                      segment_ids=(G, R, N), text_tokens=(G, R, M), text_segment_ids=(G, R, M))  # fmt: skip
        out = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        out["text_tokens"][:] = PAD_ID
        for g, group in enumerate(some):
            starts = self.starts(group)
            for r, row in enumerate(self._rows[group]):
                at = text_at = 0
                for segment, member in enumerate(row, start=1):
                    i, b = self._members[group][member]
                    item, where = self.items[i], np.arange(self.items[i].tokens)
                    caption, here = item.captions[b], slice(at, at + item.tokens)
                    slots = slice(text_at, text_at + len(caption) + 1)
                    out["source"][g, r * N + at + where] = starts[i] + where
                    out["places"][g, self.branches.index(b), starts[i] + where] = r * N + at + where
                    out["positions"][g, r, here] = positions(*item.shape, (1, 1, 1))
                    out["segment_ids"][g, r, here] = out["text_segment_ids"][g, r, slots] = segment
                    out["text_tokens"][g, r, text_at : text_at + len(caption)] = caption
                    at, text_at = here.stop, slots.stop
        whole = ("source", "places")
        return {name: x if name in whole else x.reshape(G * R, *x.shape[2:]) for name, x in out.items()}

    def starts(self, group: int) -> dict[int, int]:
        """Where, of T, each request of a group begins."""
        tokens = [self.items[i].tokens for i in self.groups[group]]
        return dict(zip(self.groups[group], np.cumsum([0, *tokens[:-1]]).tolist()))


def _lengths(longest: int, total: int, multiple: int):
    """Lengths that rows may have, the longest first; few, so that sets of requests that differ a little share one."""
    most = max(ROW_TOKENS, longest, min(2 * longest, LONG_ROW))
    if total <= most:
        return [_rounded(total, multiple)]
    steps = np.geomspace(min(most, max(longest, SHORT_ROW)), most, 24)[::-1]
    return list(dict.fromkeys(_rounded(int(n), multiple) for n in steps))


def _rounded(n: int, multiple: int) -> int:
    """Up to a multiple, and to a sixteenth to thirty-second part of itself."""
    return round_up(n, max(1, 2 ** (n.bit_length() - 6) // multiple) * multiple)
