"""Labels that are written beside an image of somebody: `IMAGE/labels/NAME`, and the list of them.

```text
<image>/                     an OME-Zarr, of whatever program
    labels/                  its attribute `labels` lists the names
        <name>/              an output that holds labels; its `image-label` has the image as source
```

Viewers show what is listed, so a run that is complete is entered there; what others have entered stays. Where the image
has consolidated metadata, readers look nowhere else, so the labels are entered there, too, with nothing else changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.storage.checksums import file_checksum, text_checksum
from oocpatch.storage.files import write_atomically
from oocpatch.storage.locks import locked_in_turn
from oocpatch.storage.paths import Address
from oocpatch.volumes.ome_metadata import ome_attributes

LABELS = "labels"
RECORD = "oocpatch"
"""The attribute by which an image says that oocpatch wrote it."""


@dataclass(frozen=True, slots=True)
class ParentImage:
    """The image that an output lies beside.

    Attributes:
        path: of the image.
        version: `"0.5"`, in Zarr 3, or `"0.4"`, in Zarr 2.
        levels: how many it has.
    """

    path: Path
    version: str
    levels: int


def parent_image(output: Address) -> ParentImage | None:
    """The image whose labels an output is; None when it lies anywhere else, or in an object store."""
    if not isinstance(output, Path) or output.parent.name != LABELS:
        return None
    image = output.parent.parent
    for name, version in (("zarr.json", "0.5"), (".zattrs", "0.4")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            found = json.loads((image / name).read_text())
            attributes = found["attributes"] if version == "0.5" else found
            return ParentImage(image, version, len(ome_attributes(attributes)["multiscales"][0]["datasets"]))
    return None


def format_in_parent(output: Address, asked: str) -> str:
    """The `output_format` of an output: what lies among the labels of an image is of its version.

    Raises:
        ValueError: when another one was asked for.
    """
    image = parent_image(output)
    if image is None or asked == "zarr":
        return asked
    wanted = "ome-zarr" if image.version == "0.5" else "ome-zarr-0.4"
    if asked not in ("auto", wanted):
        raise ValueError(
            f"labels must have the format of their image, {image.path} is an OME-Zarr {image.version}, got "
            f"output_format={asked!r}; write output_format={wanted!r}, or leave it out"
        )
    return wanted


def register_label(output: Address) -> None:
    """Enter an output that holds labels, and is complete, into the list of its image's labels.

    Idempotent; entries of others are kept, and nothing is written where all is there already.
    """
    image = parent_image(output)
    if image is None or not isinstance(output, Path):
        return
    file = "zarr.json" if image.version == "0.5" else ".zattrs"
    try:
        own = json.loads((output / file).read_text())
    except (OSError, ValueError):
        return
    if "image-label" not in ome_attributes(own.get("attributes", {}) if image.version == "0.5" else own):
        return
    folder = output.parent
    with locked_in_turn(folder.with_name(f"{LABELS}.oocpatch.lock"), str(folder), output.name):
        if image.version == "0.5":
            _enter(image.path, output.name)
        else:
            _enter_old(image.path, output.name)


def _listed(ome: Mapping[str, Any], name: str) -> dict[str, Any]:
    names = ome.get(LABELS)
    names = list(names) if isinstance(names, list) else []
    return {**ome, LABELS: names if name in names else [*names, name]}


def _enter(image: Path, name: str) -> None:
    file = image / LABELS / "zarr.json"
    metadata: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}
    metadata = json.loads(file.read_text()) if file.exists() else metadata
    attributes = metadata.get("attributes") or {}
    ome = _listed({"version": "0.5", **(attributes.get("ome") or {})}, name)
    entered = {**metadata, "attributes": {**attributes, "ome": ome}}
    text = json.dumps(entered, indent=2)
    root = json.loads((image / "zarr.json").read_text())
    # The image first: were its checksum of the list behind, the list would look damaged.
    changed = _consolidated(root, image, name, entered)
    changed = _noted(changed, root, file, text)
    if changed != root:
        write_atomically(image / "zarr.json", json.dumps(changed, indent=2))
    if entered != metadata:
        write_atomically(file, text)


def _consolidated(root: dict[str, Any], image: Path, name: str, entered: dict[str, Any]) -> dict[str, Any]:
    """The image's metadata, with consolidated ones of the labels if it has any."""
    found = root.get("consolidated_metadata")
    if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
        return root
    own = json.loads((image / LABELS / name / "zarr.json").read_text())
    below = (own.pop("consolidated_metadata", None) or {}).get("metadata", {})
    place = f"{LABELS}/{name}"
    kept = {n: m for n, m in found["metadata"].items() if n != place and not n.startswith(f"{place}/")}
    members = {**kept, LABELS: _node(entered), place: _node(own), **{f"{place}/{n}": m for n, m in below.items()}}
    return {**root, "consolidated_metadata": {**found, "metadata": members}}


def _node(metadata: dict[str, Any]) -> dict[str, Any]:
    """A group as it stands in consolidated metadata."""
    inside = {"kind": "inline", "must_understand": False, "metadata": {}}
    return {**{n: v for n, v in metadata.items() if n != "consolidated_metadata"}, "consolidated_metadata": inside}


def _noted(changed: dict[str, Any], root: dict[str, Any], file: Path, text: str) -> dict[str, Any]:
    """The same, with the checksums of an image that oocpatch wrote, if they were right before."""
    record = (root.get("attributes") or {}).get(RECORD)
    details = record.get("details") if isinstance(record, dict) else None
    if record is None or not isinstance(details, dict) or details.get(METADATA_CRC) != metadata_checksum(root, RECORD):
        return changed
    files, name = dict(details.get("files") or {}), f"{LABELS}/zarr.json"
    if name in files and file.exists() and files[name] == file_checksum(file):
        files[name] = text_checksum(text)
    noted = {**details, "files": files} if files else dict(details)
    attributes = {**changed["attributes"], RECORD: {**record, "details": noted}}
    found = {**changed, "attributes": attributes}
    noted[METADATA_CRC] = metadata_checksum(found, RECORD)
    return found


def _enter_old(image: Path, name: str) -> None:
    folder = image / LABELS
    file = folder / ".zattrs"
    before = json.loads(file.read_text()) if file.exists() else {}
    attributes = _listed(before, name)
    if not (folder / ".zgroup").exists():
        write_atomically(folder / ".zgroup", json.dumps({"zarr_format": 2}))
    if attributes != before:
        write_atomically(file, json.dumps(attributes, indent=2))
    _consolidate_old(image, name, attributes)


def _consolidate_old(image: Path, name: str, attributes: dict[str, Any]) -> None:
    """Zarr 2 has consolidated metadata in a file of their own."""
    try:
        root = json.loads((image / ".zmetadata").read_text())
        own = json.loads((image / LABELS / name / ".zmetadata").read_text())["metadata"]
    except (OSError, ValueError):
        return
    place = f"{LABELS}/{name}/"
    kept = {n: m for n, m in root["metadata"].items() if not n.startswith(place)}
    group = {f"{LABELS}/.zgroup": {"zarr_format": 2}, f"{LABELS}/.zattrs": attributes}
    changed = {**root, "metadata": {**kept, **group, **{f"{place}{n}": m for n, m in own.items()}}}
    if changed != root:
        write_atomically(image / ".zmetadata", json.dumps(changed, indent=2))
