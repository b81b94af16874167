"""What the normalize stage adds up: a block's own sums over one slab, and the seams that enter it, in turn."""

from __future__ import annotations

import torch

from oocpatch.engine.buffers import torch_dtype
from oocpatch.planning.box import Box
from oocpatch.planning.heads import Head


class SlabSums:
    """Own sums over the open parts of one slab, and the seams that are added to them in turn.

    Args:
        head: what they are sums of.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.out_dtype = torch_dtype(head.out_dtype)
        self.parts: list[tuple[Box, torch.Tensor | None]] = []

    def own(self, box: Box, data: torch.Tensor | None) -> None:
        """Begin with the block's own sums over a box; None: it has none there."""
        if not box.empty:
            self.parts.append((box, data))

    def add(self, box: Box, seam: torch.Tensor | None) -> None:
        """Add a seam over a box; for `crop` its values replace what is there."""
        if seam is None:
            return
        for i, (own, data) in enumerate(self.parts):
            common = own & box
            if common.empty:
                continue
            if data is None:
                data = torch.zeros((self.head.stored, *own.shape), dtype=seam.dtype)  # noqa: PLW2901
                if self.head.mode == "max":
                    data[: self.head.channels] = -torch.inf
                self.parts[i] = own, data
            target = data[(slice(None), *common.slices(own.start))]
            self._merge(target, seam[(slice(None), *common.slices(box.start))])

    def _merge(self, target: torch.Tensor, seam: torch.Tensor) -> None:
        head = self.head
        if head.blended:
            target.add_(seam)
        elif head.mode == "max":
            torch.maximum(target, seam, out=target)  # of the last channel, too, if it says where patches were
        elif head.dense:
            target.copy_(torch.where(seam[-1:] != 0, seam, target))
        else:
            target.copy_(seam)
