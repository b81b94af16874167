"""The source of a network, as a model package brings it."""

from __future__ import annotations

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 3, padding=1))

    def forward(self, patches):
        return self.layers(patches)
"""
