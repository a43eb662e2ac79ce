"""What is in a CellSAM checkpoint, by our names.

`model.*` is a whole Segment Anything ViT-B. `model_cp.*`, if there, is a second one, and then the one that counts for
embeddings and masks: CellSAM calls that advanced mode. `cellfinder.decode_head.*` is the detector, whose ViT is a
third. At inference only the last layer's heads count; training keeps a name for each layer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DETECTOR = "cellfinder.decode_head."
COPY, FIRST = "model_cp.", "model."
UNUSED = "unused."  # in front of the names that no part of the service reads
ADVANCED = "cellsam_advanced"  # beside the weights: 1 or 0
HEADS = re.compile(r"(detector\.transformer\.(?:class|bbox)_embed\.)(\d+)\.(.*)", re.DOTALL)


def is_cellsam(names: Iterable[str]) -> bool:
    return any(name.startswith(DETECTOR) for name in names)


def is_advanced(names: Iterable[str]) -> bool:
    """Whether the second SAM is there, which then counts."""
    return any(name.startswith(COPY) for name in names)


def renamed(names: Iterable[str]) -> list[str]:
    """Our name for each: segment_anything's for the SAM that counts, `detector.…`, or `unused.…` and the old one."""
    known = list(names)
    chosen = COPY if is_advanced(known) else FIRST
    ours = []
    for name in known:
        if name.startswith(DETECTOR):
            ours.append(f"detector.{name.removeprefix(DETECTOR)}")
        elif name.startswith(chosen):
            ours.append(name.removeprefix(chosen))
        else:
            ours.append(UNUSED + name)
    heads = [match for name in ours if (match := HEADS.fullmatch(name))]
    last = max((int(match[2]) for match in heads), default=0)
    for match in heads:
        own = f"{match[1]}{match[3]}" if int(match[2]) == last else UNUSED + match[0]
        ours[ours.index(match[0])] = own
    return ours
