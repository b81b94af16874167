"""Small files of microscopes: CZI by pylibCZIrw, and ND2, LIF and IMS, which no library writes, by their layouts."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

Array = np.ndarray[Any, Any]


def write_czi(path: Path, scenes: Sequence[Array], tile: int = 16, *, names: Sequence[str] = ("DAPI", "GFP")) -> None:
    """Write scenes of `(c, z, y, x)` or `(y, x, rgb)` beside each other, in tiles, with voxels of 0.5 x 0.5 x 2 um."""
    czi = pytest.importorskip("pylibCZIrw.czi")
    corner = -7  # not at the origin, as on a microscope
    with czi.create_czi(str(path)) as file:
        for number, scene in enumerate(scenes):
            planes = {(0, 0): scene[..., ::-1]} if scene.shape[-1] == 3 else dict(_planes(scene))
            for (c, z), plane in planes.items():
                for y in range(0, plane.shape[0], tile):
                    for x in range(0, plane.shape[1], tile):
                        part = np.ascontiguousarray(plane[y : y + tile, x : x + tile])
                        file.write(part, plane={"C": c, "Z": z}, scene=number, location=(corner + x, 3 + y))
            corner += 1000
        file.write_metadata(
            "a", channel_names=dict(enumerate(names)), scale_x=0.5e-6, scale_y=0.5e-6, scale_z=2e-6
        )  # fmt: skip


def write_czi_pyramid(path: Path, levels: Sequence[Array]) -> None:
    """Write `(y, x)` and levels of half the size each, one tile per level.

    pylibCZIrw writes the largest level only. The others are written as tiles of it, and their sizes in the volume,
    which stand before those in the file, are then replaced.
    """
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(path)) as file:
        for level in levels:
            file.write(level, location=(0, 0), scene=0)
        file.write_metadata("a", scale_x=0.5e-6, scale_y=0.5e-6)
    content = path.read_bytes()
    for number, level in enumerate(levels):
        for axis, size in zip((b"Y", b"X"), level.shape, strict=True):
            entry = axis + b"\0\0\0" + struct.pack("<iifi", 0, size, 0, size)
            assert entry in content
            content = content.replace(entry, axis + b"\0\0\0" + struct.pack("<iifi", 0, size << number, 0, size))
    path.write_bytes(content)


def _planes(stack: Array) -> Any:
    return (((c, z), stack[c, z]) for c in range(stack.shape[0]) for z in range(stack.shape[1]))


def write_nd2(path: Path, positions: Sequence[Array], *, period: float = 500.0) -> None:
    """Write positions of the stage, each `(t, z, c, y, x)` of uint16, by the chunks of version 3."""
    times, planes, channels, height, width = positions[0].shape
    point = {"dPosX": 0.0, "dPosY": 0.0, "dPosZ": 0.0}
    loops: list[dict[str, Any]] = [
        {"eType": 1, "uLoopPars": {"uiCount": times, "dStart": 0.0, "dPeriod": period, "dDuration": period * times}},
        {"eType": 2, "uLoopPars": {"Points": {f"i{n}": point for n in range(len(positions))}}},
        {"eType": 4, "uLoopPars": {"uiCount": planes, "dZStep": 2.0, "dZLow": 0.0, "dZHigh": 2.0 * (planes - 1)}},
    ]
    for outer, inner in itertools.pairwise(loops):
        outer["ppNextLevelEx"] = {"i0": inner}
    frames = [p[t, z] for t in range(times) for p in positions for z in range(planes)]
    probes = {
        f"a{c}": {"sDescription": name, "uiCompCount": 1, "pFluorescentProbe": {"m_sName": name}}
        for c, name in enumerate(["DAPI", "GFP"][:channels])
    }
    attributes = {
        "uiWidth": width, "uiHeight": height, "uiWidthBytes": 2 * width * channels, "uiComp": channels,
        "uiBpcInMemory": 16, "uiBpcSignificant": 16, "uiSequenceCount": len(frames), "eCompression": 2,
    }  # fmt: skip
    picture = {
        "sPicturePlanes": {"uiCount": channels, "sPlaneNew": probes}, "dCalibration": 0.5, "bCalibrated": True
    }  # fmt: skip
    chunks = {
        "ImageAttributesLV!": _nested("SLxImageAttributes", attributes),
        "ImageMetadataSeqLV|0!": _nested("SLxPictureMetadata", picture),
        "ImageMetadataLV!": _nested("SLxExperiment", loops[0]),
        **{f"ImageDataSeq|{n}!": bytes(8) + np.moveaxis(f, 0, 2).tobytes() for n, f in enumerate(frames)},
    }
    content = _chunk("ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver3.0".ljust(64, b"\0"), 32)
    places = b""
    for name, data in chunks.items():
        places += name.encode() + struct.pack("<QQ", len(content), len(data))
        content += _chunk(name, data, 4072)
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!"
    last = struct.pack("<Q", len(content))
    content += _chunk("ND2 FILEMAP SIGNATURE NAME 0001!", places + end + last, 32) + end + last
    path.write_bytes(content)


def _chunk(name: str, data: bytes, room: int) -> bytes:
    return struct.pack("<IIQ", 0x0ABECEDA, room, len(data)) + name.encode().ljust(room, b"\0") + data


def _nested(name: str, value: Any) -> bytes:
    """Return a value with its name as ND2 stores metadata."""
    kind = {dict: 11, bool: 1, int: 3, float: 6, str: 8}[type(value)]
    head = bytes([kind, len(name) + 1]) + (name + "\0").encode("utf-16-le")
    if kind == 11:
        body = b"".join(_nested(k, v) for k, v in value.items())
        return head + struct.pack("<IQ", len(value), len(head) + 12 + len(body)) + body + bytes(8 * len(value))
    if kind == 8:
        return head + (value + "\0").encode("utf-16-le")
    return head + struct.pack({1: "<?", 3: "<I", 6: "<d"}[kind], value)


def write_lif(path: Path, images: Mapping[str, Array]) -> None:
    """Write images of `(z, c, y, x)` of uint16, or of `(y, x, rgb)` of uint8."""
    blocks, elements = b"", ""
    for number, (name, image) in enumerate(images.items()):
        is_rgb = image.shape[-1] == 3
        stored = np.ascontiguousarray(image)
        strides = dict(zip("yxc" if is_rgb else "zcyx", stored.strides, strict=True))
        sizes = dict(zip("yxc" if is_rgb else "zcyx", stored.shape, strict=True))
        steps = {"x": (1, 0.5e-6, 1e-4), "y": (2, 0.5e-6, 0), "z": (3, -2e-6, 0)}
        dimensions = "".join(
            f'<DimensionDescription DimID="{code}" NumberOfElements="{sizes[axis]}" Origin="{origin}" '
            f'Length="{step * (sizes[axis] - 1)}" Unit="m" BitInc="0" BytesInc="{strides[axis]}"/>'
            for axis, (code, step, origin) in steps.items()
            if axis in sizes
        )
        tables = ["Red", "Green", "Blue"] if is_rgb else ["Cyan", "Magenta"]
        channels = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="{c + 1 if is_rgb else 0}" '
            f'Resolution="{8 * image.itemsize}" NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" '
            f'LUTName="{tables[c]}" IsLUTInverted="0" BytesInc="{c * strides["c"]}" BitInc="0"/>'
            for c in range(sizes["c"])
        )
        elements += (
            f'<Element Name="{name}" UniqueID="{number}"><Data><Image><ImageDescription><Channels>{channels}</Channels>'
            f"<Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
            f'<Memory Size="{stored.nbytes}" MemoryBlockID="MemBlock_{number}"/></Element>'
        )
        key = f"MemBlock_{number}"
        blocks += struct.pack("<IIBQBI", 0x70, 2 * len(key) + 14, 0x2A, stored.nbytes, 0x2A, len(key))
        blocks += key.encode("utf-16-le") + stored.tobytes()
    xml = (
        f'<LMSDataContainerHeader Version="2"><Element Name="a.lif" UniqueID="u"><Memory Size="0" MemoryBlockID="x"/>'
        f"<Children>{elements}</Children></Element></LMSDataContainerHeader>"
    )
    head = struct.pack("<IIBI", 0x70, 2 * len(xml) + 5, 0x2A, len(xml))
    path.write_bytes(head + xml.encode("utf-16-le") + blocks)


def write_ims(path: Path, levels: Sequence[Array], *, times: int = 1) -> None:
    """Write levels of `(c, z, y, x)`, filled up to whole chunks; the largest has voxels of 0.5 x 0.5 x 2 um.

    Each time holds the values of the first one and its number.
    """

    def letters(text: Any) -> Array:
        return np.frombuffer(str(text).encode(), "S1")

    with h5py.File(path, "w") as file:
        for number, level in enumerate(levels):
            for time in range(times):
                for c, channel in enumerate(level):
                    name = f"DataSet/ResolutionLevel {number}/TimePoint {time}/Channel {c}"
                    chunks = tuple(min(16, n) for n in channel.shape)
                    filling = [(0, -n % chunk) for n, chunk in zip(channel.shape, chunks, strict=True)]
                    filled = np.pad(channel + channel.dtype.type(time), filling, constant_values=9)
                    group = file.create_group(name)
                    group.create_dataset("Data", data=filled, chunks=chunks, compression="gzip")
                    for axis, size in zip("ZYX", channel.shape, strict=True):
                        group.attrs[f"ImageSize{axis}"] = letters(size)
        image = file.create_group("DataSetInfo/Image")
        image.attrs["Unit"] = letters("um")
        for number, (size, step) in enumerate(zip(levels[0].shape[:0:-1], (0.5, 0.5, 2.0), strict=True)):
            image.attrs[f"ExtMin{number}"] = letters(10)
            image.attrs[f"ExtMax{number}"] = letters(10 + size * step)
        for c, name in enumerate(["DAPI", "GFP"][: len(levels[0])]):
            file.create_group(f"DataSetInfo/Channel {c}").attrs["Name"] = letters(name)
