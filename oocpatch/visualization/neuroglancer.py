"""Show a result over its input, or any volume, in neuroglancer, in a browser of this machine.

neuroglancer's own server delivers the viewer, and `Chunks` beside it the layers, from the same address: as OME-Zarr,
whatever they are stored as, whose chunks are read when the viewer asks for them. No file is served. The server listens
on 127.0.0.1 only. Each address has a new token in it, which neither other users of the machine nor other pages know.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tornado.ioloop
import tornado.web

from oocpatch.system import import_extra
from oocpatch.visualization.anatomy import anatomical_planes
from oocpatch.visualization.layers import Layer
from oocpatch.visualization.virtual_zarr import MIXED, VirtualZarr, axis_step
from oocpatch.volumes.affine import WORLD, spacing_of

neuroglancer = import_extra("neuroglancer", "serve", "serving")  # it has no types of its own

HOSTS = r"^(127\.0\.0\.1|localhost)$"
THREADS = 4  # that read chunks
PANEL, SCREEN = 280, 700  # pixels, about, of one of four panels and of one alone: the volume fills it at first
TABLE = ".segment-properties"  # below a layer's URL
TABLE_WIDTH = 560  # pixels
COLUMNS, PLACES = 6, ("bbox_", "centroid_")  # of the table: how many are shown at first, and which are not
MILLIMETERS: list[Any] = [1e-3, "m"]
SHADER = """#uicontrol invlerp normalized
#uicontrol vec3 colour color
void main() { emitRGB(colour * normalized()); }"""

TURNS = {"axial": (0, 0, 1, 0), "coronal": (0, 0.5**0.5, -(0.5**0.5), 0), "sagittal": (-0.5, 0.5, -0.5, 0.5)}
"""Quaternions of the slices that radiologists look at, with the world's axes to the right, front and head."""


def state_of(layers: list[Layer], urls: list[str]) -> dict[str, Any]:
    """Return the state of the viewer, for layers and the URL of each."""
    volume = layers[-1].volume
    names, is_patient = volume.names[-volume.spatial_ndim :][-3:], bool(anatomical_planes(volume))
    dimensions: dict[str, list[Any]] = {n: list(axis_step(volume, n)[:2]) for n in reversed(volume.names)}
    if is_patient:
        dimensions |= dict.fromkeys(WORLD, MILLIMETERS)
        steps, voxel = spacing_of(volume.affine), 1.0
    else:
        steps = tuple(dimensions[name][0] for name in names)
        voxel = min(steps)
    extent = max(n * step for n, step in zip(volume.shape[-len(names) :], steps, strict=True)) / voxel
    tables = [layer.name for layer in layers if layer.properties is not None]
    states = [s for n, (layer, url) in enumerate(zip(layers, urls, strict=True)) for s in _layer_states(layer, url, n)]
    return {
        **({"selectedLayer": {"layer": tables[0], "visible": True, "size": TABLE_WIDTH}} if tables else {}),
        "dimensions": dimensions,
        "displayDimensions": list(WORLD) if is_patient else list(reversed(names)),
        "crossSectionScale": extent / (PANEL if len(names) > 2 else SCREEN),
        "projectionScale": 1.5 * extent,
        "layout": _slices(states) if is_patient else "4panel" if len(names) > 2 else "xy",
        "showSlices": True,
        "layers": states,
    }


def _slices(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a layout of axial, coronal and sagittal slices, and the slices in space."""
    names = [layer["name"] for layer in layers]
    panels: list[dict[str, Any]] = [
        {
            "type": "viewer",
            "layers": names,
            "layout": "xy",
            "crossSectionOrientation": {"link": "unlinked", "value": list(turn)},
        }
        for turn in TURNS.values()
    ]
    panels.append({"type": "viewer", "layers": names, "layout": "3d"})
    rows = [{"type": "row", "children": panels[:2]}, {"type": "row", "children": panels[2:]}]
    return {"type": "column", "children": rows}


def _source(layer: Layer, url: str) -> Any:
    """Return the source of a layer, with the places of voxels in the world where it has an affine."""
    volume = layer.volume
    if not anatomical_planes(volume):
        return url
    channel = None if volume.channel_axis is None else f"{volume.channel_axis}'"
    names = VirtualZarr.insert(volume, channel, volume.names)
    steps = VirtualZarr.insert(volume, [1, ""], [list(axis_step(volume, name)[:2]) for name in volume.names])
    inputs, space = dict(zip(names, steps, strict=True)), len(names) - volume.spatial_ndim
    matrix = np.eye(len(names), len(names) + 1)
    matrix[space:, space:] = volume.affine[:3] * [1e-3, 1e-3, 1e-3, 1]  # meters per voxel, from a place in millimeters
    outputs = {**dict(list(inputs.items())[:space]), **dict.fromkeys(WORLD, MILLIMETERS)}
    return {
        "url": url,
        "transform": {"outputDimensions": outputs, "inputDimensions": inputs, "matrix": matrix.tolist()},
    }


def _layer_states(layer: Layer, url: str, number: int) -> Iterator[dict[str, Any]]:
    """Yield a layer, or one per channel: the viewer mixes layers, but channels only where they share their chunks."""
    volume = layer.volume
    common: dict[str, Any] = {"name": layer.name, "source": _source(layer, url)}
    if layer.kind == "labels":
        if layer.properties is not None:
            columns = [p["id"] for p in layer.properties["inline"]["properties"] if not p["id"].startswith(PLACES)]
            common |= {"tab": "segments", "segmentQuery": " ".join(f"|{name}" for name in columns[:COLUMNS])}
            common["source"] = [common["source"], f"{url.rpartition('/|')[0]}/{TABLE}/|neuroglancer-precomputed:"]
        yield {"type": "segmentation", **common, "selectedAlpha": 0.5, "notSelectedAlpha": 0.2}
        return
    common = {"type": "image", **common, "opacity": 0.6 if number else 1}
    if not 1 < volume.channels <= MIXED:
        if volume.channels == 1:
            common["shaderControls"] = {"normalized": {"range": list(layer.windows[0])}}
        yield common
        return
    for c, (window, colour) in enumerate(zip(layer.windows, layer.colours, strict=False)):
        yield {
            **common,
            "name": f"{layer.name} {c}",
            "localDimensions": {f"{volume.channel_axis}'": [1, ""]},
            "localPosition": [c],
            "blend": "additive" if c else "default",
            "shader": SHADER,
            "shaderControls": {"normalized": {"range": list(window)}, "colour": colour},
        }


class Properties(tornado.web.RequestHandler):
    """Serves the table of a layer's objects."""

    def initialize(self, properties: Mapping[str, Any]) -> None:
        """Take what is served."""
        self.properties = properties

    def get(self) -> None:
        """Answer with the table, as JSON."""
        self.set_header("Cache-Control", "no-store")
        self.finish(dict(self.properties))


class Chunks(tornado.web.RequestHandler):
    """Serves a layer as an OME-Zarr."""

    def initialize(self, files: VirtualZarr, pool: ThreadPoolExecutor) -> None:
        """Take what is served, and the threads that read it."""
        self.files, self.pool = files, pool

    async def get(self, key: str) -> None:
        """Answer with a file; with 404 where there is none, or it cannot be read."""
        body = None
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            body = await tornado.ioloop.IOLoop.current().run_in_executor(self.pool, self.files.get, key)
        self.set_header("Cache-Control", "no-store")  # a run may still be writing
        self.set_header("Content-Type", "application/octet-stream")
        if body is None:
            self.set_status(404)
        self.finish(body)

    def compute_etag(self) -> None:
        """Return none: nothing is cached."""


def serve(layers: list[Layer], port: int, ready: Callable[[str], None]) -> None:
    """Serve layers until Ctrl-C on a port, with 0 on any that is free; `ready` is called with the address."""
    neuroglancer.set_server_bind_address("127.0.0.1", port)
    viewer = neuroglancer.UnsynchronizedViewer(allow_credentials=False)
    pool = ThreadPoolExecutor(THREADS, "oocpatch-serve")
    try:
        root, urls = f"/data/{viewer.token}", []
        handlers: list[tuple[str, type[tornado.web.RequestHandler], dict[str, Any]]] = []
        for number, layer in enumerate(layers):
            urls.append(f"{neuroglancer.server.get_server_url()}{root}/{number}/|zarr3:")
            if layer.properties is not None:
                handlers.append((rf"{root}/{number}/{TABLE}/info", Properties, {"properties": layer.properties}))
            handlers.append((rf"{root}/{number}/(.*)", Chunks, {"files": VirtualZarr(layer), "pool": pool}))
        # The application that neuroglancer started has no handler for them.
        neuroglancer.server.global_server.app.add_handlers(HOSTS, handlers)
        ready(neuroglancer.to_url(state_of(layers, urls), f"{neuroglancer.server.get_server_url()}/v/{viewer.token}/"))
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        neuroglancer.stop()
        pool.shutdown(wait=False, cancel_futures=True)
