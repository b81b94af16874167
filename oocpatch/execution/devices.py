"""Which worker process uses which device, where a machine has several of them.

```text
 processes of this machine     process 0         process 1         process 2
 CUDA_VISIBLE_DEVICES          0                 1                 0             of two devices

 workers of a cluster          host a, first     host a, second    host b, first
 that see two devices          cuda:0            cuda:1            cuda:0
 that see one                  cuda              cuda              cuda
```
"""

from __future__ import annotations

from collections.abc import Mapping


def visible(number: int, count: int, given: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` of a process that this machine is to start.

    Args:
        number: of the process, from 0.
        count: of the devices that can be used.
        given: `CUDA_VISIBLE_DEVICES` of this process, if it is set.

    >>> [visible(number, 2, None) for number in range(3)], visible(1, 2, "4,GPU-5f2c")
    (['0', '1', '0'], 'GPU-5f2c')
    """
    names = [str(i) for i in range(count)] if given is None else [name.strip() for name in given.split(",")]
    return names[number % min(count, len(names))]


def place_of(address: str, taken: Mapping[str, int]) -> int:
    """The number of a worker process among those of its host: the smallest that no other one has.

    Args:
        address: of the process, such as `tcp://10.0.0.2:41234`.
        taken: numbers of the other processes, by address.

    >>> place_of("tcp://b:3", {"tcp://a:1": 0, "tcp://b:1": 0, "tcp://b:2": 2})
    1
    """
    host = address.rpartition(":")[0]
    numbers = {number for other, number in taken.items() if other.rpartition(":")[0] == host}
    return min(set(range(len(numbers) + 1)) - numbers)


def device_at(place: int, device: str, count: int) -> str:
    """The device of a worker process that was asked to use `device`, and sees so many CUDA devices.

    >>> [device_at(place, "cuda", 2) for place in range(3)], device_at(1, "cuda", 1), device_at(1, "cuda:0", 2)
    (['cuda:0', 'cuda:1', 'cuda:0'], 'cuda', 'cuda:0')
    """
    return f"cuda:{place % count}" if device == "cuda" and count > 1 else device
