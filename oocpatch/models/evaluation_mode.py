"""The mode of networks while runs call them, and the turns of runs that call the same ones.

A network may hide behind a function, an object or a list, so all that a model reaches is searched. Runs in several
threads may share one: the first switches it to evaluation mode, the last puts back what the first found, and in between
they take turns.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from oocpatch.models.reach import callables_of

_LOCK = threading.Lock()
_USES: dict[int, _Use] = {}
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True, order=True)
class _Turn:
    """A lock with a number: who needs several takes them in the order of their numbers."""

    number: int = field(default_factory=_NUMBERS.__next__)
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)


@dataclass(slots=True)
class _Use:
    """The use of a network, or of another callable, by the runs of this process.

    Attributes:
        called: the callable; kept, since the id of a freed one would be given to another.
        eval_mode: whether it is in evaluation mode for the runs.
        turn: taken for each call.
        training: whether it is a network and was in training mode before.
        buffers: name, buffer and copy of what calls in training mode change.
        runs: number of runs.
    """

    called: Any
    eval_mode: bool
    turn: _Turn
    training: bool
    buffers: list[tuple[str, torch.Tensor, torch.Tensor]]
    runs: int = 0

    @classmethod
    def of(cls, called: Any, turn: _Turn, *, eval_mode: bool) -> _Use:
        """Begin to use a callable."""
        training = isinstance(called, nn.Module) and bool(getattr(called, "training", False))
        changed = called.named_buffers(recurse=False) if training and not eval_mode else ()
        buffers = [(name, b, b.clone()) for name, b in changed if not nn.parameter.is_lazy(b)]
        return cls(called, eval_mode, turn, training, buffers)

    def restore(self) -> None:
        """Put back what was there before."""
        if self.training and self.eval_mode:
            self.called.training = True
        for name, buffer, copy in self.buffers:
            setattr(self.called, name, buffer.copy_(copy))


class EvaluationMode:
    """The mode of all networks that a model reaches, for one run.

    Args:
        model: a module or any other callable.
        eval_mode: False leaves networks in the mode that they are in; what calls do to their buffers is undone.
    """

    def __init__(self, model: Callable[..., Any], *, eval_mode: bool = True) -> None:
        self._model = model
        self._eval_mode = eval_mode
        self._uses: dict[int, _Use] = {}
        self._turns = [_Turn()]
        self._threads: set[int] = set()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch networks to evaluation mode, and back to what they were in.

        Raises:
            ValueError: when another run of this process uses one in the other mode.
        """
        try:
            for called in callables_of(self._model):
                self._use(called)
            yield
        finally:
            self._release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no run calls what this one does.

        Networks that are made in the first call of a thread are switched when they are called.
        """
        thread = threading.get_ident()
        with contextlib.ExitStack() as stack:
            for turn in self._turns:
                stack.enter_context(turn.lock)
            if self._uses and self._eval_mode and thread not in self._threads:
                self._threads.add(thread)

                def switch(module: nn.Module, _: Any) -> None:
                    if module.training and threading.get_ident() == thread:
                        self._use(module)

                if not any(hasattr(use.called, "_orig_mod") for use in self._uses.values()):  # the compiler sees hooks
                    stack.callback(register_module_forward_pre_hook(switch).remove)
            yield

    def _use(self, called: Any) -> None:
        with _LOCK:
            use = _USES.get(id(called)) or _Use.of(called, self._turns[-1], eval_mode=self._eval_mode)
            if use.eval_mode != self._eval_mode and isinstance(called, nn.Module):
                raise ValueError(
                    f"eval_mode must be {use.eval_mode}, as for another run of this process that uses the same "
                    f"{type(called).__name__} at this time, got {self._eval_mode}; run one after the other, or copy it"
                )
            if id(called) in self._uses:
                return
            self._uses[id(called)] = _USES[id(called)] = use
            use.runs += 1
            if use.training and self._eval_mode:
                called.training = False
            self._turns = sorted({*self._turns, use.turn})

    def _release(self) -> None:
        with _LOCK:
            while self._uses:
                key, use = self._uses.popitem()
                use.runs -= 1
                if not use.runs:
                    del _USES[key]
                    use.restore()
