"""The predictor: the user's model as a function of batches.

Threads of one call wait for each other, so several calls with few threads each use the cores better than one with all
of them: a network without state is called so, by threads of the predictor's own. The plan has the number of calls and
their threads, on which last bits depend. All other models are called by one block at a time, with all of torch's
threads, since they need not be thread-safe.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from oocpatch.errors import DeviceLost, error_line
from oocpatch.models.compilation import OptimizedModel
from oocpatch.models.evaluation_mode import EvaluationMode
from oocpatch.models.input_spec import as_input, input_dtype
from oocpatch.models.named_outputs import DEFAULT_HEAD, joined, owned_outputs
from oocpatch.system import usable_cores

logger = logging.getLogger("oocpatch")

Model = Callable[[torch.Tensor], Any]
Result = TypeVar("Result")
NUMPY_DTYPES = frozenset(torch.from_numpy(np.empty(0, kind)).dtype for kind in "?bBhHiIlLefd")


class Predictor:
    """The user's model as a function of batches.

    Args:
        model: a `torch.nn.Module`, or a callable: `(B, C, *patch)` -> `(B, C', *spatial)`, or a vector per patch,
            `(B, D)`, or a dict of such tensors.
        device: where it runs, e.g. `"cpu"` or `"cuda:0"`; `"cuda"` is the current one of the thread that makes this.
        autocast: run under `torch.autocast`.
        looped: number of looped axes in front of the spatial ones, which the model does not see.
        copies_input: whether patches must be copied before the model sees them.
        threads: threads of torch for each call, since results depend on it.
        own_thread: whether all calls are made by one thread, whichever asks for them; see `compilation`.
        calls: calls at a time. More than one have threads of their own, and only a model without state may have them.
        eval_mode: whether networks are in evaluation mode; else in the mode that they were in before.

    Attributes:
        halving: counts the batches that did not fit into memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str,
        autocast: bool = False,
        looped: int = 0,
        copies_input: bool = True,
        threads: int | None = None,
        own_thread: bool = False,
        calls: int = 1,
        eval_mode: bool = True,
    ) -> None:
        self.model = model
        # with its number: each thread has a current CUDA device of its own
        self.device = f"cuda:{torch.cuda.current_device()}" if torch.device(device) == torch.device("cuda") else device
        self._is_cuda = torch.device(device).type == "cuda"
        self.copies_input = copies_input
        self._autocast = autocast
        self.looped = looped
        self._threads = threads or torch_threads()
        self.dtype = input_dtype(model)
        self.halving = Halving(model)
        self._mode = EvaluationMode(model, eval_mode=eval_mode)
        self._thread = model_thread() if own_thread else None
        self._calls = calls
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Put the module on its device and in evaluation mode, and its mode and layout back afterwards."""
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if isinstance(self.model, torch.nn.Module):
                self.model.to(self.device)
                for module in self.model.modules():
                    if isinstance(module, OptimizedModel):
                        stack.enter_context(module.ready())
            stack.enter_context(self._mode.active())
            if self._calls > 1:
                self._pool = stack.enter_context(ThreadPoolExecutor(self._calls, "oocpatch-calls"))
                stack.callback(setattr, self, "_pool", None)
            # other algorithms give other last bits; a block that is computed again must give the same
            for name, value in (("deterministic", True), ("benchmark", False)):
                stack.callback(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
                setattr(torch.backends.cudnn, name, value)
            if self._is_cuda:
                torch.cuda.synchronize(self.device)  # blocks have threads of their own, and so streams of their own
            yield

    def submit(self, function: Callable[..., Result], *args: Any) -> Callable[[], Result]:
        """Begin a function that calls this, and return what gives its result; where calls take turns, it ends first."""
        if self._pool is not None:
            return self._pool.submit(function, *args).result
        result = function(*args)
        return lambda: result

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on `(B, C, *patch)` and return its outputs by name, `(B, C', *spatial)` or `(B, D)`.

        Raises:
            ValueError: when it does not return tensors of real numbers with as many axes, or vectors.
        """
        looped = tuple(range(2, 2 + self.looped))  # patches have one index of each
        inputs = batch.squeeze(looped) if looped else batch
        before = version(inputs)
        with self._mode.turn() if self._calls == 1 else contextlib.nullcontext():
            results = self._thread.submit(self._run, inputs).result() if self._thread else self._run(inputs)
        if version(inputs) != before and not self.copies_input:
            raise RuntimeError("the model wrote to its input, but not when it was probed; let it work on x.clone()")
        outputs = {
            name: self._tensor(result, inputs, "" if name == DEFAULT_HEAD else f" for {name!r}")
            for name, result in results.items()
        }
        for axis in looped:
            outputs = {name: o if is_vectors(o) else o.unsqueeze(axis) for name, o in outputs.items()}
        return outputs

    def _run(self, inputs: torch.Tensor) -> dict[str, Any]:
        use_threads(self._threads)
        try:
            # no_grad, not inference_mode: the version counter of tensors tells whether the model writes to its input
            with (
                on_device(self.device),
                torch.no_grad(),
                torch.autocast(torch.device(self.device).type, enabled=self._autocast),
            ):
                return owned_outputs(self.halving, as_input(inputs, self.dtype))
        except Exception as error:
            if _is_lost(error):
                message = f"{self.device} failed: {error_line(error)}; the same call in a new process continues"
                raise DeviceLost(message) from error
            raise
        finally:
            use_threads(1)

    def _tensor(self, result: Any, inputs: torch.Tensor, which: str) -> torch.Tensor:
        if np.ma.is_masked(result):
            raise ValueError(f"the model must return plain arrays{which}, got a masked one; return x.filled(...)")
        if not isinstance(result, torch.Tensor):
            try:
                result = torch.as_tensor(result, device=inputs.device)
            except Exception as error:
                raise ValueError(f"the model must return a tensor{which}, got {type(result).__name__}") from error
        if result.layout != torch.strided:
            raise ValueError(f"the model must return dense tensors{which}, got a sparse one; return x.to_dense()")
        has_axes = is_vectors(result) or result.ndim == inputs.ndim
        if not has_axes or result.shape[0] != inputs.shape[0] or 0 in result.shape[1:]:
            expected = f"({inputs.shape[0]}, C, {', '.join(map(str, inputs.shape[2:]))})"
            advice = ", or (B, D) for a vector per patch"
            if result.shape == inputs.shape[:1]:  # one number per patch
                ones = ", None" * (inputs.ndim - 1)
                advice = f"; for one number per patch return answer[:, None] for rows, answer[:{ones}] for a map"
            raise ValueError(f"the model must return shape {expected}{which}, got {tuple(result.shape)}{advice}")
        if result.dtype == torch.bfloat16:  # Zarr has no such dtype, and float32 holds every value
            result = result.to(torch.float32)
        if result.is_complex():
            raise ValueError(f"the model must return real numbers{which}, got {result.dtype}")
        if result.dtype not in NUMPY_DTYPES:
            raise ValueError(
                f"the model must return a dtype that numpy has{which}, got {result.dtype}; return x.float()"
            )
        output: torch.Tensor = result
        return output


def is_vectors(output: torch.Tensor) -> bool:
    """Return whether an output is a vector per patch, `(B, D)`; others have the axes of patches, one at least.

    >>> is_vectors(torch.zeros(4, 512)), is_vectors(torch.zeros(4, 512, 1))
    (True, False)
    """
    return output.ndim == 2


def version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to in place."""
    return int(tensor._version)  # noqa: SLF001 - torch documents the counter, but has no public name for it


def resolve_device(device: str) -> str:
    """Return the device that `"auto"` stands for, CUDA's, else Apple's, else the CPU; any other name as it is.

    Raises:
        ValueError: for a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(
            f"device must be one that torch can use here, such as cpu or cuda:0, got {device!r}: {error_line(error)}"
        ) from error
    return device


def device_count(device: str) -> int:
    """Return the number of devices that `"cuda"` stands for: those like the current one; 1 for other names."""
    if device != "cuda":
        return 1
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names.count(torch.cuda.get_device_name())


def on_device(device: str) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one of this thread: each thread has its own, where a model makes tensors."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else contextlib.nullcontext()


def torch_threads() -> int:
    """Return torch's number of threads, and no more than there are cores: torch does not know of containers' quotas."""
    return min(torch.get_num_threads(), usable_cores())


def use_threads(count: int) -> None:
    """Let torch use so many threads for what the calling thread does.

    Torch reads its setting when a thread first asks, and would overwrite what was set before: hence asked for twice.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
    torch.set_num_threads(count)


def _is_lost(error: Exception) -> bool:
    """Return whether no later call on the device can succeed, as after a failed assertion in a kernel."""
    kinds = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.8 has it
    return isinstance(error, kinds) and str(error).startswith("CUDA error") and not out_of_memory(error)


OUT_OF_MEMORY = (
    "out of memory",  # CUDA, in the versions that raise a plain RuntimeError, and cuBLAS
    "not enough memory",  # torch's allocator for the CPU
    "can't allocate memory",
    "failed to allocate memory",  # onnxruntime
    "status_alloc_failed",  # cuBLAS and cuDNN
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)


@functools.cache
def model_thread() -> ThreadPoolExecutor:
    """Return the one thread of this process that calls models with CUDA graphs: torch keeps these per thread."""
    return ThreadPoolExecutor(1, "oocpatch-model")


class Halving:
    """Function that calls a model, and halves the batch when memory runs out.

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
        """Return the model's output for a batch `(B, C, *patch)`.

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
                message = "memory ran out with %d patches in a batch; going on with %d: lower batch_size"
                logger.warning(message, len(batch), self._most)
            backend = getattr(torch, batch.device.type)  # `torch.cuda` or `torch.mps`
            if hasattr(backend, "empty_cache"):
                backend.empty_cache()
        count = self.count
        outputs = [owned_outputs(self, part) for part in torch.split(batch, self._most)]
        self.count = count + 1  # a batch that is halved twice is still one batch
        return joined(outputs)


def out_of_memory(error: BaseException) -> bool:
    """Return True for an error that means that memory ran out.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")), out_of_memory(RuntimeError("no"))
    (True, False)
    """
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)
