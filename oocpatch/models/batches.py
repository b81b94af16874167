"""Batches of another size than was asked for: fitted to what a model takes, or halved when memory runs out.

```text
 the model takes 4:      p0 p1 p2 p3 | p4 p5 p5 p5      6 patches: the last call is filled up, the filling thrown away
 memory runs out at 4:   p0 p1 | p2 p3                  and later batches begin with 2
```
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from oocpatch.models.input_spec import Accepts

logger = logging.getLogger("oocpatch")

OUT_OF_MEMORY = (
    "out of memory",  # CUDA, in the versions that raise a plain RuntimeError, and cuBLAS
    "not enough memory",  # torch's allocator for the CPU
    "can't allocate memory",
    "failed to allocate memory",  # onnxruntime
)


class ModelFile(nn.Module):
    """A model that was loaded from a file which says what it takes.

    Args:
        program: the model.
        accepts: what it takes.

    >>> two_at_a_time = ModelFile(nn.Identity(), Accepts(least_batch=2, most_batch=2))
    >>> two_at_a_time(torch.arange(3)[:, None]).tolist()
    [[0], [1], [2]]
    """

    def __init__(self, program: nn.Module, accepts: Accepts) -> None:
        super().__init__()
        self.program = program
        self.accepts = accepts

    @property
    def described(self) -> tuple[object, ...]:
        """What says which model it is, besides its program."""
        return ("file",)

    def forward(self, patches: torch.Tensor) -> Any:
        """Outputs for any number of patches `(B, C, *patch)`."""
        least, most = self.accepts.least_batch, self.accepts.most_batch or len(patches)
        outputs = []
        for part in torch.split(patches, most):
            missing = max(0, least - len(part))
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(first(self.program(filled), len(part)))
        return joined(outputs)


class Halving:
    """Calls a model, and halves the batch when memory runs out.

    Halves may round differently than the whole, so it is counted how many batches were halved.

    Args:
        call: the model, as a function of a batch.

    Attributes:
        count: batches that were not computed in one call.
    """

    def __init__(self, call: Callable[[torch.Tensor], Any]) -> None:
        self._call = call
        self._most: int | None = None
        self.count = 0

    def __call__(self, batch: torch.Tensor) -> Any:
        """The model's output for a batch `(B, C, *patch)`.

        Raises:
            Exception: what the model raises; out of memory, only for a single patch.
        """
        if self._most is None or len(batch) <= self._most:
            try:
                return self._call(batch)
            except Exception as error:
                if not out_of_memory(error) or len(batch) == 1:
                    raise
                self._most = len(batch) // 2
                logger.warning(
                    "memory ran out with %d patches in a batch; going on with %d: lower batch_size",
                    len(batch),
                    self._most,
                )
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()
        self.count += 1
        return joined([self._parts(part) for part in torch.split(batch, self._most)])

    def _parts(self, part: torch.Tensor) -> Any:
        count = self.count
        try:
            return self(part)
        finally:
            self.count = count  # a batch that is halved twice is still one batch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")), out_of_memory(RuntimeError("no"))
    (True, False)
    """
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of parts of a batch, tensors or dicts of them, as those of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], dict):
        return {name: joined([output[name] for output in outputs]) for name in outputs[0]}
    return torch.cat([torch.as_tensor(output) for output in outputs])


def first(output: Any, count: int) -> Any:
    """What a batch's output, a tensor or a dict of them, has for its first patches; anything else stays as it is."""
    if isinstance(output, dict):
        return {name: first(value, count) for name, value in output.items()}
    return output[:count] if isinstance(output, torch.Tensor) else output
