"""Show a result over its input in neuroglancer, in a browser of this machine.

neuroglancer's own server delivers the viewer, and `ZarrFiles` beside it the files of the shown directories, from the
same address: `StaticFileServer` of neuroglancer would let pages of other sites read them, and follow links out of the
directory. The server listens on 127.0.0.1 only. Each address has a new token in it, which neither other users of the
machine nor other pages know.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocpatch.outputs.ome_zarr import axis_transform
from oocpatch.outputs.record import array_path
from oocpatch.storage.paths import LocalPath, expand_home
from oocpatch.visualization import colormaps
from oocpatch.visualization.display_source import DisplaySource, open_display_source, record_of
from oocpatch.visualization.object_table import read_table, segment_properties
from oocpatch.visualization.picture import fractions, input_of, is_rgb, kind_of, noted_volume
from oocpatch.visualization.slices import plane
from oocpatch.volumes.formats.spec import parse_address
from oocpatch.volumes.ome_metadata import METERS, ome_attributes
from oocpatch.volumes.volume import Volume

try:
    import neuroglancer  # type: ignore[import-untyped]  # it has no types of its own
    import tornado.web
except ImportError as error:
    raise ValueError("serving needs neuroglancer: pip install 'oocpatch[serve]'") from error

DTYPES = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32"})  # the viewer's
HOSTS = r"^(127\.0\.0\.1|localhost)$"
PIXELS = 256  # of the plane that windows are computed from
PANEL, SCREEN = 330, 700  # pixels, about, of one of four panels and of one alone: the volume fills it at first
TABLE = ".segment-properties"  # below a layer's URL
TABLE_WIDTH = 560  # pixels
COLUMNS, PLACES = 6, ("bbox_", "centroid_")  # of the table: how many are shown at first, and which are not
RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
MIXED = 6  # channels that are mixed at most; of more, one is shown, with a slider
SHADER = """#uicontrol invlerp normalized
#uicontrol vec3 colour color
void main() { emitRGB(colour * normalized()); }"""


@dataclass(frozen=True)
class Layer:
    """A volume or an output to show.

    Attributes:
        folder: directory whose files are served.
        path: of the image or array in it.
        kind: `"labels"`, `"scores"`, `"image"` or `"rgb"`.
        is_ome: OME-Zarr metadata give the positions of its voxels.
        windows: values shown as black and white, per channel.
        properties: the table of its objects, as `segment_properties` returns it; None: there is none.
    """

    name: str
    folder: Path
    path: str
    source: DisplaySource
    kind: str
    is_ome: bool
    windows: tuple[tuple[float, float], ...] = ()
    properties: Mapping[str, Any] | None = None


def layers_of(
    output: Any,
    *,
    volume: Any = None,
    head: str | None = None,
    kind: str = "auto",
    axes: str | None = None,
    table: Any = None,
) -> tuple[list[Layer], list[str]]:
    """Return the layers of a result or a volume, the input first, and messages about those that cannot be shown.

    The first layer of labels that is not the input has the rows of the table as properties of its segments.

    Raises:
        ValueError: when nothing can be shown, or there are no labels for a table.
    """
    properties = None if table is None else segment_properties(read_table(table))
    record = record_of(output)
    heads = [head] if record is None or head is not None else list(record.details["heads"]) or [None]
    sources = [open_display_source(output, PIXELS, head=name, axes=axes if record is None else None) for name in heads]
    candidates = [(s.head or Path(os.fspath(output)).name, output, s, kind) for s in sources]
    below = input_of(sources[0], volume, PIXELS)
    if below is not None:
        candidates.insert(0, ("input", noted_volume(sources[0]) if volume is None else volume, below, "auto"))
    layers, refused = [], []
    for candidate in candidates:
        try:
            layers.append(_layer(*candidate))
        except ValueError as error:
            refused.append(str(error))
    if not layers:
        raise ValueError("; ".join(refused))
    if table is not None:
        labels = [n for n, layer in enumerate(layers) if layer.kind == "labels" and layer.source is not below]
        if not labels:
            raise ValueError(f"a table needs labels, but {os.fspath(output)} is shown as {layers[-1].kind}")
        layers[labels[0]] = replace(layers[labels[0]], properties=properties)
    return layers, refused


def _layer(name: str, address: Any, source: DisplaySource, kind: str) -> Layer:
    """Return a layer; refuse one that the viewer cannot read."""
    volume = source.volume
    if str(volume.dtype) not in DTYPES:
        raise ValueError(f"{name}: the viewer reads {', '.join(sorted(DTYPES))}, got {volume.dtype}")
    place = None
    address = expand_home(address) if isinstance(address, (str, os.PathLike)) else address
    if isinstance(address, str) and parse_address(str(address)) is None and Path(address).is_dir():
        place = _place(Path(address), source)
    if place is None:
        raise ValueError(
            f"{name}: only Zarr in local directories is served, got {address}; `oocpatch convert` makes one"
        )
    last = len(volume.shape) - 1
    values = plane(volume, (last - 1, last), (PIXELS, PIXELS), [0.5] * (last + 1)) if last else np.zeros((1, 1))
    chosen = kind_of(source, [values]) if kind == "auto" else kind
    if chosen == "labels" and volume.dtype.kind == "f":
        chosen = "image"
    windows = [(0.0, 255.0)] * 3 if is_rgb(source) else [colormaps.window_of([v]) for v in values]
    if chosen == "scores" and fractions([values]):
        windows = [(0.0, 1.0)] * len(values)
    return Layer(name, Path(address).absolute(), place[0], source, chosen, place[1], tuple(windows))


def _place(folder: Path, source: DisplaySource) -> tuple[str, bool] | None:
    """Return the path of an image or array in a directory, and whether it is an OME-Zarr; None where it is no Zarr."""
    if source.record is not None and source.head is not None:
        path, details = array_path(source.record, source.head), source.record.details
        if details.get("pyramids") and source.record.complete:  # before that coarser levels are missing
            return path.rpartition("scale0/")[0].strip("/"), True
        return path, False
    with contextlib.suppress(OSError, ValueError):  # an array
        if "multiscales" in ome_attributes(dict(zarr.open_group(LocalStore(folder), mode="r").attrs)):
            return "", True
    location, root = source.volume.source.location, folder.resolve()
    if not isinstance(location, LocalPath):
        return None
    return ("" if location == root else location.relative_to(root).as_posix()), False


def state_of(layers: list[Layer], urls: list[str]) -> dict[str, Any]:
    """Return the state of the viewer, for layers and the URL of each."""
    volume = layers[-1].source.volume
    names = volume.names[-volume.spatial_ndim :][-3:]
    steps = [_step(volume, name)[0] for name in names]
    extents = [n * step for n, step in zip(volume.shape[-len(names) :], steps, strict=True)]
    extent = max(extents) / min(steps)  # in voxels
    tables = [layer.name for layer in layers if layer.properties is not None]
    return {
        **({"selectedLayer": {"layer": tables[0], "visible": True, "size": TABLE_WIDTH}} if tables else {}),
        "dimensions": {name: list(_step(volume, name)[:2]) for name in reversed(volume.names)},
        "displayDimensions": list(reversed(names)),
        "crossSectionScale": extent / (PANEL if len(names) > 2 else SCREEN),
        "projectionScale": 1.5 * extent,
        "layout": "4panel" if len(names) > 2 else "xy",
        "showSlices": True,
        "layers": [s for n, (a, url) in enumerate(zip(layers, urls, strict=True)) for s in _layer_states(a, url, n)],
    }


def _step(volume: Volume, name: str) -> tuple[float, str, float]:
    """Return the voxel size along an axis in meters or the axis' own unit, the unit, and the start in voxels."""
    try:
        axis, step, start = axis_transform(volume, name)
    except ValueError:  # coordinates that are all the same
        return 1.0, "", 0.0
    if step < 0:
        if volume.source.image is None:
            return 1.0, "", 0.0
        step, start = -step, -start  # as the image stores it
    if axis.unit in METERS:
        return step * 10.0 ** METERS[axis.unit], "m", start / step
    return step, "", start / step


def _layer_states(layer: Layer, url: str, number: int) -> Iterator[dict[str, Any]]:
    """Yield a layer, or one per channel: the viewer mixes layers, but channels only where they share their chunks."""
    volume = layer.source.volume
    common: dict[str, Any] = {"name": layer.name, "source": url}
    if not layer.is_ome:
        common["source"] = {"url": url, "transform": _transform(volume)}
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
    tones = RGB if layer.kind == "rgb" else [colormaps.label_colour(c + 1) for c in range(volume.channels)]
    for c, (window, tone) in enumerate(zip(layer.windows, tones, strict=False)):
        yield {
            **common,
            "name": f"{layer.name} {c}",
            "localDimensions": {f"{volume.channel_axis}'": [1, ""]},
            "localPosition": [c],
            "blend": "additive" if c else "default",
            "shader": SHADER,
            "shaderControls": {"normalized": {"range": list(window)}, "colour": "#{:02x}{:02x}{:02x}".format(*tone)},
        }


def _transform(volume: Volume) -> dict[str, Any]:
    """Return names, units and positions of an array's axes."""
    inputs, outputs, matrix = {}, {}, []
    for a, name in enumerate(volume.axes.names):
        is_channel = a == volume.axes.channel
        step, unit, start = (1.0, "", 0.5) if is_channel else _step(volume, name)
        inputs[name] = outputs[f"{name}'" if is_channel else name] = [step, unit]
        corner = (start if math.isfinite(start) else 0.0) - 0.5  # positions are those of centres
        matrix.append([*(float(b == a) for b in range(len(volume.axes.names))), corner])
    return {"outputDimensions": outputs, "inputDimensions": inputs, "matrix": matrix}


class Properties(tornado.web.RequestHandler):
    """Serves the table of a layer's objects."""

    def initialize(self, properties: Mapping[str, Any]) -> None:
        """Take what is served."""
        self.properties = properties

    def get(self) -> None:
        """Answer with the table, as JSON."""
        self.set_header("Cache-Control", "no-store")
        self.finish(dict(self.properties))


class ZarrFiles(tornado.web.StaticFileHandler):
    """Serves the files of a directory, with ranges of bytes."""

    def validate_absolute_path(self, root: str, absolute_path: str) -> str:
        """Return the path of a file in the directory, to which a link may lead."""
        with contextlib.suppress(ValueError):  # a NUL in it
            path = Path(os.path.realpath(absolute_path))
            if path.is_relative_to(os.path.realpath(root)) and path.is_file():
                return str(path)
        raise tornado.web.HTTPError(404)

    def send_error(self, *_: Any, **__: Any) -> None:
        """Answer with 404 and no message, whatever the reason."""
        self.clear()
        self.set_status(404)
        self.finish()

    def log_exception(self, *_: Any) -> None:
        """Log nothing: a viewer asks for many chunks that are not stored."""

    def set_default_headers(self) -> None:
        """Forbid caching: a run may still be writing."""
        self.set_header("Cache-Control", "no-store")

    def compute_etag(self) -> None:
        """Return none: a digest would be computed from the whole file, and kept."""


def serve(layers: list[Layer], port: int, ready: Callable[[str], None]) -> None:
    """Serve layers until Ctrl-C on a port, with 0 on any that is free; `ready` is called with the address."""
    neuroglancer.set_server_bind_address("127.0.0.1", port)
    viewer = neuroglancer.UnsynchronizedViewer(allow_credentials=False)
    try:
        root, urls = f"/data/{viewer.token}", []
        handlers: list[tuple[str, type[tornado.web.RequestHandler], dict[str, Any]]] = []
        for number, layer in enumerate(layers):
            driver = "zarr3" if (layer.folder / layer.path / "zarr.json").exists() else "zarr2"
            place = f"{number}/{quote(layer.path)}".rstrip("/")
            urls.append(f"{neuroglancer.server.get_server_url()}{root}/{place}/|{driver}:")
            if layer.properties is not None:
                handlers.append((rf"{root}/{place}/{TABLE}/info", Properties, {"properties": layer.properties}))
            handlers.append((rf"{root}/{number}/(.*)", ZarrFiles, {"path": str(layer.folder)}))
        # The application that neuroglancer started has no handler for files.
        neuroglancer.server.global_server.app.add_handlers(HOSTS, handlers)
        ready(neuroglancer.to_url(state_of(layers, urls), f"{neuroglancer.server.get_server_url()}/v/{viewer.token}/"))
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        neuroglancer.stop()
