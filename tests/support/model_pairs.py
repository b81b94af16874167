# ruff: noqa: E501 - each model in a line
"""Models in pairs, as texts of files: such as differ in one thing, and such as do not.

A text is that of `net.py`, which defines `model`; after a line `## NAME` comes that of another file. `@` stands for what
differs. Run as a program, it prints the fingerprints of all models of a JSON file, as another process sees them.
"""

from __future__ import annotations

import importlib
import json
import linecache
import os
import sys
from pathlib import Path
from typing import Any

START = """
import collections, dataclasses, enum, functools, json, os, pathlib, threading, types, typing
import numpy as np
import torch
from torch import nn


class Call:
    def __init__(self, **items):
        self.__dict__.update(items)

    def __call__(self, patches):
        return patches * self.item
"""

CALLS = """
class Net(nn.Module):
    def __init__(self, item):
        super().__init__()
        self.item = item

    def forward(self, patches):
        return self.use(self.item, patches)

    def use(self, item, patches):
        return patches * item
"""

DIFFERENT: dict[str, tuple[str, Any, Any]] = {
    # what a module, an object or a function holds
    "float": ("model = Call(item=@)", "1.0", "3.0"),
    "sign of zero": ("model = Call(item=@)", "0.0", "-0.0"),
    "integer and float": ("model = Call(item=@)", "1", "1.0"),
    "boolean and integer": ("model = Call(item=@)", "True", "1"),
    "text": ("model = Call(item='@')", "mean", "max"),
    "list": ("model = Call(item=[1, @])", "2", "3"),
    "order of a list": ("model = Call(item=[@])", "1, 2", "2, 1"),
    "tuple and list": ("model = Call(item=@)", "(1, 2)", "[1, 2]"),
    "set": ("model = Call(item={'a', '@'})", "b", "c"),
    "dict": ("model = Call(item={'gain': @})", "1", "3"),
    "key of a dict": ("model = Call(item={'@': 1})", "gain", "bias"),
    "dict in a list in a dict": ("model = Call(item={'a': [{'gain': @}]})", "1", "3"),
    "default of a dict": ("model = Call(item=collections.defaultdict(lambda: @))", "1", "3"),
    "array": ("model = Call(item=np.array([1, @]))", "2", "3"),
    "dtype of an array": ("model = Call(item=np.zeros(2, '@'))", "f4", "i4"),
    "shape of an array": ("model = Call(item=np.zeros(@))", "(2, 3)", "(3, 2)"),
    "fields of an array": ("model = Call(item=np.zeros(2, [('@', 'f4')]))", "a", "b"),
    "array of objects": ("model = Call(item=np.array([{'a': @}], object))", "1", "3"),
    "tensor": ("model = Call(item=torch.tensor([1., @]))", "2", "3"),
    "dtype of a tensor": ("model = Call(item=torch.zeros(2, dtype=torch.@))", "float16", "bfloat16"),
    "simple namespace": ("model = Call(item=types.SimpleNamespace(gain=@))", "1", "3"),
    "object in an object": ("model = Call(item=Call(item=@))", "1", "3"),
    "enum": ("class E(enum.Enum):\n    A = 1\n    B = 2\nmodel = Call(item=E.@)", "A", "B"),
    "value of an enum": ("class E(enum.IntEnum):\n    A = @\nmodel = Call(item=E.A)", "1", "3"),
    "dataclass": ("@dataclasses.dataclass\nclass D:\n    gain: float = 0\nmodel = Call(item=D(§))", "1", "3"),
    "method of a named tuple": (
        (
            "class T(typing.NamedTuple):\n    gain: float\n    def use(self, x):\n        return x * self.gain * @\n"
            "T_ = T(1.0)\ndef model(x):\n    return T_.use(x)"
        ),
        "1",
        "3",
    ),
    "method of a dict": (
        "class D(dict):\n    def use(self, x):\n        return x * @\nmodel = Call(item=D(a=1))",
        "1",
        "3",
    ),
    "slots": (
        "class S:\n    __slots__ = ('gain',)\nS_ = S()\nS_.gain = @\nmodel = Call(item=S_)",
        "1",
        "3",
    ),
    "partial": ("model = functools.partial(lambda x, gain: x * gain, gain=@)", "1", "3"),
    "partial of a partial": ("model = functools.partial(functools.partial(torch.mul), other=@)", "1", "3"),
    "bound method": (
        "class M:\n    gain = @\n    def run(self, x):\n        return x * self.gain\nmodel = M().run",
        "1",
        "3",
    ),
    "class attribute of a base": ("class A(Call):\n    item = @\nclass B(A): pass\nmodel = B()", "1", "3"),
    "property": ("class A(Call):\n    @property\n    def item(self):\n        return §\nmodel = A()", "1", "3"),
    "cached property": (
        "class A(Call):\n    @functools.cached_property\n    def item(self):\n        return §\nmodel = A()",
        "1",
        "3",
    ),
    "static method": (
        (
            "class A:\n    @staticmethod\n    def f(x):\n        return x * §\n    def __call__(self, x):\n        return self.f(x)\n"
            "model = A()"
        ),
        "1",
        "3",
    ),
    "closure": ("def make(gain):\n    return lambda x: x * gain\nmodel = make(@)", "1", "3"),
    "closure of a closure": (
        "def make(gain):\n    def inner(x):\n        return x * gain\n    return lambda x: inner(x)\nmodel = make(@)",
        "1",
        "3",
    ),
    "default": ("def model(x, gain=@):\n    return x * gain", "1", "3"),
    "keyword default": ("def model(x, *, gain=@):\n    return x * gain", "1", "3"),
    "constant of a module": ("GAIN = @\ndef model(x):\n    return x * GAIN", "1", "3"),
    "global list": ("GAINS = [1, @]\ndef model(x):\n    return x * GAINS[1]", "1", "3"),
    "operator": ("def model(x):\n    return x @ 2", "*", "+"),
    "attribute of a function": ("def model(x):\n    return x * model.gain\nmodel.gain = @", "1", "3"),
    "other library function": ("def model(x):\n    return torch.@(x)", "sin", "cos"),
    "seed": ("R = np.random.default_rng(@)\ndef model(x):\n    return x * R.random()", "1", "3"),
    "cached function": (
        "@functools.lru_cache\ndef gain():\n    return §\ndef model(x):\n    return x * gain()",
        "1",
        "3",
    ),
    # written, and read for another reason
    "item beside a counter": (
        "STATE = {'calls': 0, 'gain': @}\ndef model(x):\n    STATE['calls'] += 1\n    return x * STATE['gain']",
        "1",
        "3",
    ),
    "attribute beside a counter": (
        "S = types.SimpleNamespace(calls=0, gain=@)\ndef model(x):\n    S.calls += 1\n    return x * S.gain",
        "1",
        "3",
    ),
    "attribute of the name of one that is written": (
        CALLS.replace(
            "return patches * item",
            "out = types.SimpleNamespace()\n        out.item = patches\n        return out.item * item",
        )
        + "model = Net(@)",
        "1",
        "3",
    ),
    "object with a method add": (
        "class Adder:\n    def __init__(self, n):\n        self.n = n\n    def add(self, x):\n        return x + self.n\n"
        + CALLS.replace("patches * item", "item.add(patches)")
        + "model = Net(Adder(@))",
        "1",
        "3",
    ),
    "written in training only": (
        (
            "class Norm(nn.Module):\n    mean = None\n    def __init__(self):\n        super().__init__()\n        self.mean = @\n"
            "    def forward(self, x):\n        if self.training:\n            self.mean = x.mean()\n        return x - self.mean\n"
            "model = Norm()"
        ),
        "1.0",
        "3.0",
    ),
    "global of the name of a variable": (
        (
            "gains = [@]\ndef scaled(x):\n    return x * gains[0]\ndef model(x):\n    gains = []\n    gains.append(scaled(x))\n"
            "    return gains[0]"
        ),
        "1",
        "3",
    ),
    "global of the name of a variable in a closure": (
        (
            "gain = @\ndef scaled(x):\n    return x * gain\ndef model(x):\n    gain = scaled(x)\n"
            "    return (lambda: gain)()"
        ),
        "1",
        "3",
    ),
    "setter that no call uses": (
        "class A(Call):\n    def set(self, item):\n        self.item = item\nmodel = A(item=@)",
        "1",
        "3",
    ),
    # parts of networks
    "weights": ("torch.manual_seed(@)\nmodel = nn.Conv2d(1, 1, 3)", "1", "3"),
    "buffer": (CALLS + "model = Net(1)\nmodel.register_buffer('b', torch.ones(1) * @)", "1", "3"),
    "layers": ("model = nn.Sequential(nn.ReLU(), nn.@())", "ReLU", "SELU"),
    "hook": ("model = nn.ReLU()\nmodel.register_forward_hook(lambda m, a, out: out * @)", "1", "3"),
    "network in a list": ("N = [nn.Softplus(@)]\ndef model(x):\n    return N[0](x)", "1", "3"),
    # other files
    "function of another module": (
        "from helper import f\ndef model(x):\n    return f(x)\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "constant of another module": (
        "import helper\ndef model(x):\n    return x * helper.GAIN\n## helper.py\nGAIN = @",
        "1",
        "3",
    ),
    "module through a module": (
        (
            "import helper\ndef model(x):\n    return helper.f(x)\n## helper.py\nimport other\ndef f(x):\n    return other.g(x)\n"
            "## other.py\ndef g(x):\n    return x * @"
        ),
        "1",
        "3",
    ),
    "module with a method's name": (
        "import helper\ndef model(x):\n    return helper.add(x)\n## helper.py\ndef add(x):\n    return x + @",
        "1",
        "3",
    ),
    "submodule": (
        "import pack.sub\ndef model(x):\n    return pack.sub.f(x)\n## pack/__init__.py\n\n## pack/sub.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "class of another module": (
        "import helper\nmodel = helper.A()\n## helper.py\nclass A:\n    def __call__(self, x):\n        return x * @",
        "1",
        "3",
    ),
    "base class of another module": (
        (
            "import helper\nclass B(helper.A):\n    def __call__(self, x):\n        return super().__call__(x)\nmodel = B()\n"
            "## helper.py\nclass A:\n    def __call__(self, x):\n        return x * @"
        ),
        "1",
        "3",
    ),
    "import in a function": (
        "def model(x):\n    from helper import f\n    return f(x)\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "module in a function": (
        "def model(x):\n    import helper\n    return helper.f(x)\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "getattr": (
        "import helper\ndef model(x):\n    return getattr(helper, 'f')(x)\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "decorator of another module": (
        "from helper import d\n@d\ndef model(x):\n    return x\n## helper.py\ndef d(f):\n    return lambda x: f(x) * §",
        "1",
        "3",
    ),
    "relative import": (
        "from pack.sub import model\n## pack/__init__.py\n\n## pack/sub.py\ndef model(x):\n    from . import other\n    return other.f(x)\n## pack/other.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "module that an object holds": (
        "import helper\nclass A:\n    def __init__(self):\n        self.ops = {'a': helper}\n    def __call__(self, x):\n        return self.ops['a'].f(x)\nmodel = A()\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "module by its name": (
        "import importlib\ndef model(x):\n    return importlib.import_module('helper').f(x)\n## helper.py\ndef f(x):\n    return x * @",
        "1",
        "3",
    ),
    "environment": (
        "os.environ['OOCPATCH_GAIN'] = '@'\ndef model(x):\n    return x * float(os.environ['OOCPATCH_GAIN'])",
        "1",
        "3",
    ),
    "what pickle is not told": (
        "class A(Call):\n    def __getstate__(self):\n        return {}\nmodel = A(item=@)",
        "1",
        "3",
    ),
    "what pickle makes anew": (
        "class A(Call):\n    def __reduce__(self):\n        return A, ()\nmodel = A(item=@)",
        "1",
        "3",
    ),
    "partial method": (
        "class A:\n    def f(self, gain, x):\n        return x * gain\n    __call__ = functools.partialmethod(f, @)\nmodel = A()",
        "1",
        "3",
    ),
    "key that is a function": ("def f(x): return x\nF = {f: @}\ndef model(x):\n    return x * F[f]", "1", "3"),
    "file without a suffix": ("def model(x):\n    return x * float(open('gain').read())\n## gain\n@", "1", "3"),
    "file in a configuration": (
        "class A:\n    def __init__(self):\n        self.config = {'files': ['gain.txt']}\n    def __call__(self, x):\n        return x * np.loadtxt(self.config['files'][0])\nmodel = A()\n## gain.txt\n@",
        "1",
        "3",
    ),
    "file of a constant path": (
        "def model(x):\n    return x * float(open('gain.txt').read())\n## gain.txt\n@",
        "1",
        "3",
    ),
    "file of an attribute": (
        "class A:\n    path = 'gain.txt'\n    def __call__(self, x):\n        return x * np.loadtxt(self.path)\nmodel = A()\n## gain.txt\n@",
        "1",
        "3",
    ),
    "file of a path": (
        "P = pathlib.Path('data') / 'gain'\ndef model(x):\n    return x * float(P.read_text())\n## data/gain\n@",
        "1",
        "3",
    ),
    "file beside the source": (
        "def model(x):\n    return x * float((pathlib.Path(__file__).parent / 'data' / 'gain.txt').read_text())\n## data/gain.txt\n@",
        "1",
        "3",
    ),
    "file in a folder that is held": (
        (
            "class A:\n    def __init__(self, folder):\n        self.folder = folder\n    def __call__(self, x):\n"
            "        return x * float(open(os.path.join(self.folder, 'gain.txt')).read())\n"
            "model = A(os.path.abspath('data'))\n## data/gain.txt\n@"
        ),
        "1",
        "3",
    ),
    "file in a folder of the module": (
        "HERE = pathlib.Path(__file__).parent\ndef model(x):\n    return x * float((HERE / 'gain.txt').read_text())\n## gain.txt\n@",
        "1",
        "3",
    ),
    "file by a formatted text": (
        "D = os.path.abspath('.')\ndef model(x):\n    return x * json.load(open(f'{D}/gain.json'))['gain']\n## gain.json\n{\"gain\": @}",
        "1",
        "3",
    ),
}

# One text and another, or what is done to the model before it is read again.
SAME: dict[str, tuple[str, str]] = {
    "comment": ("def model(x):\n    return x * 2", "def model(x):\n    # twice\n    return x * 2  # as said"),
    "layout": ("def model(x):\n    return max(x, 2)", "\n\n\ndef model( x ):\n    return max(\n        x, 2,\n    )"),
    "quotes": ("def model(x):\n    return {'a': x}['a']", 'def model(x):\n    return {"a": x}["a"]'),
    "quotes in a formatted text": (
        "def model(x):\n    return f\"{x['a']}\"",
        "def model(x):\n    return f'{x[\"a\"]}'",
    ),
    "brackets": ("def model(x):\n    return x * 2 + 1", "def model(x):\n    return ((x * 2) + 1)"),
    "docstring": ("def model(x):\n    return x", "def model(x):\n    '''Copy.'''\n    return x"),
    "docstring of a class": (
        "class A:\n    def __call__(self, x):\n        return x\nmodel = A()",
        "class A:\n    '''Copy.'''\n    def __call__(self, x):\n        '''Copy.'''\n        return x\nmodel = A()",
    ),
    "annotations": (
        "def model(x, k=2):\n    y = x\n    return y * k",
        "def model(x: torch.Tensor, k: int = 2) -> torch.Tensor:\n    y = x\n    return y * k",
    ),
    "comment in another module": (
        "import helper\ndef model(x):\n    return helper.f(x)\n## helper.py\ndef f(x):\n    return x",
        "import helper\ndef model(x):\n    return helper.f(x)\n## helper.py\n# copies\ndef f(x):\n    return x",
    ),
    "other functions of the file": (
        "def model(x):\n    return x * 2",
        "def other(x):\n    return x\n\ndef model(x):\n    return x * 2",
    ),
    "constants that it does not use": (
        "A = 1\nB = 2\ndef model(x):\n    return x * A",
        "A = 1\nB = 3\ndef model(x):\n    return x * A",
    ),
    "file that it does not read": (
        "def model(x):\n    return x\n## gain.txt\n1",
        "def model(x):\n    return x\n## gain.txt\n3",
    ),
    "same file again": (
        "def model(x):\n    return x * float(open('gain.txt').read())\n## gain.txt\n1",
        "def model(x):\n    return x * float(open('gain.txt').read())\n## gain.txt\n1",
    ),
    "order of a set": ("model = Call(item={'a', 'b', 'c', 'd'})", "model = Call(item={'d', 'c', 'b', 'a'})"),
    "order of attributes": ("model = Call(item=1, a=2)", "model = Call(a=2, item=1)"),
    "order of an array in memory": (
        "model = Call(item=np.arange(6.).reshape(2, 3))",
        "model = Call(item=np.asfortranarray(np.arange(6.).reshape(2, 3)))",
    ),
    "view and copy": ("model = Call(item=torch.arange(4.)[1:3])", "model = Call(item=torch.tensor([1., 2.]))"),
    "one list twice, and two": ("L = [1]\nmodel = Call(item=L, a=L)", "model = Call(item=[1], a=[1])"),
    "gradients": (CALLS + "model = Net(torch.ones(1))", CALLS + "model = Net(torch.ones(1, requires_grad=True))"),
    "training": ("model = nn.Dropout().train()", "model = nn.Dropout().eval()"),
}

_STATE: dict[str, str] = {
    "counter": "class A:\n    n = 0\n    def __call__(self, x):\n        self.n += 1\n        return x\nmodel = A()",
    "counter of a module": CALLS.replace("return patches * item", "self.n += 1\n        return patches")
    + "model = Net(1)\nmodel.n = 0",
    "counter of a helper": "class C:\n    n = 0\n    def step(self):\n        self.n += 1\nclass A:\n    def __init__(self):\n        self.c = C()\n    def __call__(self, x):\n        self.c.step()\n        return x\nmodel = A()",
    "counter of a held object": "class A:\n    def __init__(self):\n        self.stats = types.SimpleNamespace(n=0)\n    def __call__(self, x):\n        self.stats.n += 1\n        return x\nmodel = A()",
    "counter of a class": "class A:\n    n = 0\n    def __call__(self, x):\n        A.n += 1\n        type(self).n += 1\n        return x\nmodel = A()",
    "counter of a function": "def model(x):\n    model.n += 1\n    return x\nmodel.n = 0",
    "global counter": "N = 0\ndef model(x):\n    global N\n    N += 1\n    return x",
    "counter of another function": "N = 0\ndef count():\n    global N\n    N += 1\ndef model(x):\n    count()\n    print(N, end='')\n    return x",
    "counter in a closure": "def make():\n    n = 0\n    def model(x):\n        nonlocal n\n        n += 1\n        return x\n    return model\nmodel = make()",
    "counter in a dict": "S = {'n': 0, 'gain': 2}\ndef model(x):\n    S['n'] += 1\n    return x * S['gain']",
    "counter in another module": "import helper\ndef model(x):\n    helper.N += 1\n    return x\n## helper.py\nN = 0",
    "integer buffer": CALLS.replace("return patches * item", "self.n += 1\n        return patches")
    + "model = Net(1)\nmodel.register_buffer('n', torch.tensor(0))",
    "cache": "class A:\n    def __init__(self):\n        self.cache = {}\n    def __call__(self, x):\n        self.cache[x.shape] = x\n        return x\nmodel = A()",
    "cache of a class": "class A:\n    cache = {}\n    def __call__(self, x):\n        self.cache.setdefault(x.shape, x)\n        return x\nmodel = A()",
    "global cache": "CACHE = {}\ndef model(x):\n    CACHE[tuple(x.shape)] = x\n    return x",
    "cached function": "@functools.lru_cache\ndef window(n):\n    return torch.ones(n)\ndef model(x):\n    return x * window(x.shape[-1])",
    "cached property": "class A:\n    @functools.cached_property\n    def window(self):\n        return torch.ones(4)\n    def __call__(self, x):\n        return x * self.window\nmodel = A()",
    "made when first needed": "class A:\n    net = None\n    def __call__(self, x):\n        if self.net is None:\n            self.net = nn.ReLU()\n        return self.net(x)\nmodel = A()",
    "log": "LOG = []\ndef model(x):\n    LOG.append(x.shape)\n    return x",
    "log file": "class A:\n    log = 'calls.log'\n    def __call__(self, x):\n        with open(self.log, 'a') as f:\n            f.write('called')\n        return x\nmodel = A()",
    "log file of a constant name": "def model(x):\n    with open('calls.log', 'a') as f:\n        f.write('called')\n    return x",
    "log file of a path": "P = pathlib.Path('calls.log')\ndef model(x):\n    P.write_text(str(x.shape))\n    return x",
    "memory of its own": "class A:\n    def __init__(self):\n        self.kept = {}\n    def __call__(self, x):\n        out = self.kept.setdefault(x.shape, torch.empty_like(x))\n        return torch.mul(x, 2, out=out)\nmodel = A()",
    "single dispatch": "@functools.singledispatch\ndef f(x):\n    return x\n@f.register\ndef _(x: torch.Tensor):\n    return x * 2\ndef model(x):\n    return f(x)",
    "random numbers": "R = np.random.default_rng(1)\ndef model(x):\n    return x * R.random()",
    "batch norm": "model = nn.BatchNorm1d(4).eval()",
    "statistics by a list": "class A:\n    def __init__(self):\n        self.times = collections.deque(maxlen=9)\n    def __call__(self, x):\n        self.times.append(1)\n        return x\nmodel = A()",
    "lock": "L = threading.Lock()\ndef model(x):\n    with L:\n        return x",
    "setattr": "class A:\n    def __call__(self, x):\n        setattr(self, 'last', x)\n        return x\nmodel = A()",
    "counter by another name": "class A:\n    def __init__(self):\n        self.stats = types.SimpleNamespace(n=0)\n    def __call__(self, x):\n        stats = self.stats\n        stats.n += 1\n        return x\nmodel = A()",
    "counters in a list": "class C:\n    n = 0\n    def step(self):\n        self.n += 1\nclass A:\n    def __init__(self):\n        self.counters = [C(), C()]\n    def __call__(self, x):\n        for counter in self.counters:\n            counter.step()\n        return x\nmodel = A()",
    "counter of itertools": "import itertools\nC = itertools.count()\ndef model(x):\n    next(C)\n    return x",
    "class with items": "class C:\n    def __init__(self):\n        self.d = {}\n    def __setitem__(self, key, value):\n        self.d[key] = value\nclass A:\n    def __init__(self):\n        self.cache = C()\n    def __call__(self, x):\n        self.cache[x.shape] = x\n        return x\nmodel = A()",
    "output of a hook": "A = {}\nmodel = nn.Sequential(nn.Linear(4, 4))\nmodel[0].register_forward_hook(lambda m, i, o: A.__setitem__('o', o))",
    "memory that is overwritten": "class A:\n    def __init__(self):\n        self.kept = torch.zeros(2, 4)\n    def __call__(self, x):\n        return self.kept.copy_(x)\nmodel = A()",
    "memory that is an output": "B = torch.zeros(2, 4)\ndef model(x):\n    return torch.mul(x, 2, out=B)",
    "memory that is assigned to": "B = np.zeros((2, 4), 'f4')\ndef model(x):\n    B[:] = x.numpy()\n    return torch.from_numpy(B)",
    "item of a list": "S = [0, 2]\ndef model(x):\n    S[0] += 1\n    return x * S[1]",
}
SAME |= {f"called: {name}": (text, "called") for name, text in _STATE.items()}
_TRAVELS = (
    "list",
    "set",
    "dataclass",
    "value of an enum",
    "method of a named tuple",
    "closure of a closure",
    "partial",
    "bound method",
    "slots",
    "weights",
    "hook",
    "global list",
    "tensor",
    "simple namespace",
)
SAME |= {
    f"pickled: {name}": (DIFFERENT[name][0].replace("@" if name != "dataclass" else "§", DIFFERENT[name][1]), "pickled")
    for name in _TRAVELS
}


def text_of(name: str, number: int) -> str:
    """Return the text of one of two models that differ."""
    template, *values = DIFFERENT[name]
    return template.replace("§" if "§" in template else "@", values[number])


def write(folder: Path, text: str) -> None:
    """Write the files of a model."""
    for part in f"## net.py\n{START}\n{text}".split("## ")[1:]:
        name, _, content = part.partition("\n")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def forget() -> None:
    """Forget the modules of models that were imported."""
    for name in ("net", "helper", "other", "pack", "pack.sub", "pack.other"):
        sys.modules.pop(name, None)


def loaded(folder: Path) -> Any:
    """Return the model of a folder, imported anew."""
    forget()
    importlib.invalidate_caches()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("net").model
    finally:
        sys.path.remove(str(folder))


if __name__ == "__main__":
    from oocpatch.models.fingerprint import model_fingerprint

    sys.dont_write_bytecode = True
    for place in json.loads(Path(sys.argv[1]).read_text()):
        linecache.clearcache()
        sys.path.insert(0, place)
        print(model_fingerprint(loaded(Path(place))))
        sys.path.remove(place)
