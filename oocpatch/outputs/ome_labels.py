"""Outputs that are labels of an existing image: `IMAGE/labels/NAME`, registered in the image's list of labels.

```text
<image>/                     an OME-Zarr, written by any program
    labels/                  its attribute `labels` lists the names
        <name>/              an output with labels; its `image-label` names the image as source
```

Viewers show the listed labels, so the name of a complete output is added to the list; other entries stay. If the image
has consolidated metadata, readers use nothing else, so the labels are added there as well; the rest stays as it is.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.outputs.record import ATTRIBUTE
from oocpatch.storage.checksums import file_checksum, text_checksum
from oocpatch.storage.locks import locked_in_turn
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.ome_metadata import ome_attributes

LABELS = "labels"


@dataclass(frozen=True, slots=True)
class ParentImage:
    """The image to whose labels an output belongs.

    Attributes:
        path: directory of the image.
        version: `"0.5"`, in Zarr 3, or `"0.4"`, in Zarr 2, which is read only.
        levels: number of its levels.
    """

    path: StoragePath
    version: str
    levels: int


def parent_image(output: StoragePath) -> ParentImage | None:
    """Return the image to whose labels an output belongs; None for other paths, and in an object store."""
    if not output.is_local or output.parent.name != LABELS:
        return None
    image = output.parent.parent
    for name, version in (("zarr.json", "0.5"), (".zattrs", "0.4")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            metadata = json.loads((image / name).read_text())
            attributes = metadata["attributes"] if version == "0.5" else metadata
            return ParentImage(image, version, len(ome_attributes(attributes)["multiscales"][0]["datasets"]))
    return None


def format_in_parent(output: StoragePath, requested: str) -> str:
    """Return the `output_format` of an output: that of its image if it belongs to the labels of one.

    Raises:
        ValueError: if the image has a version that oocpatch does not write.
    """
    image = parent_image(output)
    if image is None or requested not in ("auto", "ome-zarr"):
        return requested
    if image.version != "0.5":
        raise ValueError(
            f"labels must have the format of their image, {image.path} is an OME-Zarr {image.version}, got labels in "
            "0.5; write them to a path of their own, or to an image in 0.5"
        )
    return "ome-zarr"


def register_label(output: StoragePath) -> None:
    """Add a complete output with labels to the list of labels of its image.

    Idempotent. Other entries stay, and nothing is written if nothing changes.
    """
    image = parent_image(output)
    if image is None or image.version != "0.5":
        return
    try:
        own = json.loads((output / "zarr.json").read_text())
    except (OSError, ValueError):
        return
    if "image-label" in ome_attributes(own.get("attributes", {})):
        folder = output.parent
        with locked_in_turn(folder.with_name(f"{LABELS}.oocpatch.lock"), str(folder), output.name):
            _register(image.path, output.name)


def _register(image: StoragePath, name: str) -> None:
    """Add a label to the list and to the consolidated metadata of an image."""
    file = image / LABELS / "zarr.json"
    metadata: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}
    metadata = json.loads(file.read_text()) if file.exists() else metadata
    attributes = metadata.get("attributes") or {}
    ome = {"version": "0.5", **(attributes.get("ome") or {})}
    names = ome[LABELS] if isinstance(ome.get(LABELS), list) else []
    ome[LABELS] = names if name in names else [*names, name]
    labels = {**metadata, "attributes": {**attributes, "ome": ome}}
    text = json.dumps(labels, indent=2)
    root = json.loads((image / "zarr.json").read_text())
    # The image first: if its checksum of the list were older than the list, the list would look damaged.
    new_root = _with_checksums(_with_consolidated(root, image, name, labels), root, file, text)
    if new_root != root:
        (image / "zarr.json").write_atomic(json.dumps(new_root, indent=2))
    if labels != metadata:
        file.write_atomic(text)


def _with_consolidated(root: dict[str, Any], image: StoragePath, name: str, labels: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an image with a label in its consolidated metadata, if it has any."""
    consolidated = root.get("consolidated_metadata")
    if not isinstance(consolidated, dict) or not isinstance(consolidated.get("metadata"), dict):
        return root
    label = json.loads((image / LABELS / name / "zarr.json").read_text())
    nodes = (label.pop("consolidated_metadata", None) or {}).get("metadata", {})
    path = f"{LABELS}/{name}"
    others = {n: m for n, m in consolidated["metadata"].items() if n != path and not n.startswith(f"{path}/")}
    members = {**others, LABELS: _node(labels), path: _node(label), **{f"{path}/{n}": m for n, m in nodes.items()}}
    return {**root, "consolidated_metadata": {**consolidated, "metadata": members}}


def _node(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a group as a node of consolidated metadata."""
    return {**metadata, "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}}}


def _with_checksums(new_root: dict[str, Any], root: dict[str, Any], file: StoragePath, text: str) -> dict[str, Any]:
    """Return the new metadata of an image with updated checksums, if oocpatch wrote it and the old ones were right."""
    record: Any = (root.get("attributes") or {}).get(ATTRIBUTE)
    details = record.get("details") if isinstance(record, dict) else None
    if not isinstance(details, dict) or details.get(METADATA_CRC) != metadata_checksum(root, ATTRIBUTE):
        return new_root
    files, name = dict(details.get("files") or {}), f"{LABELS}/zarr.json"
    if name in files and file.exists() and files[name] == file_checksum(file):
        files[name] = text_checksum(text)
    new_details = {**details, "files": files} if files else dict(details)
    attributes = {**new_root["attributes"], ATTRIBUTE: {**record, "details": new_details}}
    metadata = {**new_root, "attributes": attributes}
    new_details[METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    return metadata
