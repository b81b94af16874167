"""Files that tables of objects are written to: a format per ending, each streamed in batches of a fixed size.

The bytes of a file are a function of its rows alone: they do not depend on how the rows arrive. All formats but the
data frame are written under another name and renamed when complete.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from oocpatch.errors import PlanTooLarge
from oocpatch.objects.columns import INTENSITY_PROPERTIES, Columns, TableSchema
from oocpatch.objects.polygons import Ring
from oocpatch.planning.plan import human
from oocpatch.system import import_extra

Array = npt.NDArray[Any]
Polygons = Iterator[list[list[Ring]]]

BATCH = 1 << 16
"""Rows that are written at a time."""

TEXT_ROWS = 1 << 11
"""Rows that are text at a time, which takes many times the memory of numbers."""

HDF5_ROWS = 1 << 13
"""Rows of a chunk of an HDF5 file."""


class TableFile(Protocol):
    """Receives the rows of a table in order."""

    def write(self, columns: Columns, polygons: Polygons | None) -> None:
        """Add rows, with the polygons of each object where the format has them."""

    def close(self) -> None:
        """Write what is left, and complete the file."""


class CsvFile:
    """A table as text, with the shortest digits that give each number back."""

    def __init__(self, path: Path, schema: TableSchema) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._file.write(",".join(map(_quoted, schema.dtypes)) + "\n")

    def write(self, columns: Columns, polygons: Polygons | None) -> None:  # noqa: ARG002 - of TableFile
        for start in range(0, len(columns["label"]), TEXT_ROWS):
            texts = [_texts(values[start : start + TEXT_ROWS]) for values in columns.values()]
            self._file.writelines(f"{','.join(row)}\n" for row in zip(*texts, strict=True))

    def close(self) -> None:
        self._file.close()


def _quoted(name: str) -> str:
    """Return the name of a column, quoted where a CSV file needs it.

    >>> _quoted("mean_DAPI"), _quoted("mean_CD3, T")
    ('mean_DAPI', '"mean_CD3, T"')
    """
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name


def _texts(values: Array) -> list[str]:
    """Return numbers as text; empty for NaN."""
    if values.dtype.kind == "f":
        return ["" if value != value else repr(value) for value in values.astype(np.float64).tolist()]  # noqa: PLR0124
    return list(map(str, values.tolist()))


class GeoJsonFile:
    """Polygons in pixels, a feature per object, as QuPath and GeoPandas read them."""

    def __init__(self, path: Path, schema: TableSchema) -> None:
        self._indices = schema.indices
        self._holders = ("min", "max") if schema.channels else ("label", "label")
        self._classes = {
            value: {"name": name} | ({"color": list(colour)} if colour else {})
            for value, name, colour in schema.classes
        }
        self._file = path.open("w", encoding="utf-8", newline="")
        self._file.write('{"type":"FeatureCollection","features":[')
        self._before = "\n"

    def write(self, columns: Columns, polygons: Polygons | None) -> None:
        names = list(columns)
        numbers = [values.tolist() for values in columns.values()]
        for row, shape in zip(zip(*numbers, strict=True), polygons or (), strict=True):
            values = dict(zip(names, row, strict=True))
            properties: dict[str, Any] = {"objectType": "detection"}
            if self._classes:
                low, high = (values[name] for name in self._holders)
                named = self._classes.get(low) if low == high else None
                properties |= {"classification": named} if named else {}
            properties["label"] = values.pop("label")
            properties |= {name: values.pop(name) for name in self._indices}
            measured = {k: v for k, v in values.items() if v == v}  # noqa: PLR0124 - JSON has no NaN
            properties |= {"measurements": measured} if measured else {}
            geometry = geometry_of(shape)
            if len(self._indices) == 1:
                geometry["plane"] = {"c": -1, "z": 0, "t": properties[self._indices[0]]}
            feature = {"type": "Feature", "geometry": geometry, "properties": properties}
            self._file.write(self._before + json.dumps(feature, separators=(",", ":")))
            self._before = ",\n"

    def close(self) -> None:
        self._file.write("\n]}\n")
        self._file.close()


def geometry_of(polygons: Sequence[Sequence[Ring]]) -> dict[str, Any]:
    """Return polygons as a geometry of GeoJSON, with closed rings.

    >>> geometry_of([[[(0, 0), (1, 0), (1, 1), (0, 1)]]])
    {'type': 'Polygon', 'coordinates': [[(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]]}
    """
    closed = [[[*ring, ring[0]] for ring in rings] for rings in polygons]
    if len(closed) == 1:
        return {"type": "Polygon", "coordinates": closed[0]}
    return {"type": "MultiPolygon", "coordinates": closed}


class ParquetFile:
    """A table in columns, by pyarrow; units are in the metadata of the columns."""

    def __init__(self, path: Path, schema: TableSchema) -> None:
        pa, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        fields = [
            pa.field(name, pa.from_numpy_dtype(dtype), nullable=False, metadata=_unit_metadata(unit))
            for (name, dtype), unit in zip(schema.dtypes.items(), column_units(schema).values(), strict=True)
        ]
        self._table, self._schema = pa.table, pa.schema(fields)
        self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, columns: Columns, polygons: Polygons | None) -> None:  # noqa: ARG002 - of TableFile
        self._file.write_table(self._table(columns, schema=self._schema), row_group_size=BATCH)

    def close(self) -> None:
        self._file.close()


def _unit_metadata(unit: str) -> dict[str, str] | None:
    return {"unit": unit} if unit else None


class AnnDataFile:
    """An AnnData in HDF5: `obs` has the columns, `obsm["spatial"]` the centroids, `X` the mean of each channel.

    It is written in batches as the specification of AnnData's format on disk has it, since anndata itself would need
    the whole table in memory.
    """

    def __init__(self, path: Path, schema: TableSchema) -> None:
        h5py = importlib.import_module("h5py")
        self._text = h5py.string_dtype()
        self._file, self._schema = h5py.File(path, "w"), schema
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        dtypes = schema.dtypes
        obs = self._frame("obs", list(dtypes))
        self._add(obs, "_index", self._text, (), "string-array")
        for name, dtype in dtypes.items():
            self._add(obs, name, dtype, ())
        var = self._frame("var", [])
        names = np.array(schema.channels or [], dtype=object)
        self._described(var.create_dataset("_index", data=names, dtype=self._text), "string-array", "0.2.0")
        for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            self._described(self._file.create_group(name), "dict", "0.1.0")
        self._add(self._file["obsm"], "spatial", np.dtype("f8"), (len(schema.axes),))
        if schema.channels:
            self._add(self._file, "X", np.dtype("f8"), (len(schema.channels),))

    def write(self, columns: Columns, polygons: Polygons | None) -> None:  # noqa: ARG002 - of TableFile
        obs, schema = self._file["obs"], self._schema
        keys = [_texts(columns[name]) for name in ("label", *schema.indices)]
        _append(obs["_index"], np.array(["-".join(key) for key in zip(*keys, strict=True)], dtype=object))
        for name in schema.dtypes:
            _append(obs[name], columns[name])
        _append(self._file["obsm/spatial"], np.stack([columns[name] for name in schema.spatial], axis=1))
        if schema.channels:
            means = [columns[f"mean_{c}" if len(schema.channels) > 1 else "mean"] for c in schema.channels]
            _append(self._file["X"], np.stack(means, axis=1))

    def close(self) -> None:
        self._file.close()

    def _frame(self, name: str, columns: list[str]) -> Any:
        frame = self._file.create_group(name)
        self._described(frame, "dataframe", "0.2.0")
        frame.attrs["_index"] = "_index"
        frame.attrs.create("column-order", np.array(columns, dtype=object), dtype=self._text)
        return frame

    def _add(self, group: Any, name: str, dtype: Any, shape: tuple[int, ...], kind: str = "array") -> None:
        size = (0, *shape), (None, *shape), (HDF5_ROWS, *shape)
        dataset = group.create_dataset(name, size[0], dtype, maxshape=size[1], chunks=size[2], compression="gzip")
        self._described(dataset, kind, "0.2.0")

    @staticmethod
    def _described(item: Any, kind: str, version: str) -> None:
        item.attrs.update({"encoding-type": kind, "encoding-version": version})


def _append(dataset: Any, values: Array) -> None:
    before = len(dataset)
    dataset.resize(before + len(values), axis=0)
    dataset[before:] = values


class FrameFile:
    """A table that is returned as a `pandas.DataFrame`, if it fits in memory: arrays of some rows, column by column."""

    def __init__(self, path: Path, schema: TableSchema, limit: int) -> None:
        self._file, self._schema, self._limit, self._rows = path.open("wb"), schema, limit, 0

    def write(self, columns: Columns, polygons: Polygons | None) -> None:  # noqa: ARG002 - of TableFile
        self._rows += len(columns["label"])
        # Batches and the frame that is made of them are both in memory in the end.
        size = 2 * self._rows * sum(dtype.itemsize for dtype in self._schema.dtypes.values())
        if size > self._limit:
            raise PlanTooLarge(
                f"the table has {self._rows:,} rows or more, which need {human(size, up=True)}, but max_memory is "
                f"{human(self._limit)}; write it to a file with output=, or raise max_memory"
            )
        for values in columns.values():
            np.save(self._file, values, allow_pickle=False)

    def close(self) -> None:
        self._file.close()


def read_frame(path: Path, schema: TableSchema) -> Any:
    """Return the table that a `FrameFile` wrote, with the units of its columns in `attrs`."""
    pd = importlib.import_module("pandas")  # half a second of imports
    batches = {name: [np.empty(0, dtype)] for name, dtype in schema.dtypes.items()}
    with path.open("rb") as file:
        while file.tell() < path.stat().st_size:
            for of_column in batches.values():
                of_column.append(np.load(file, allow_pickle=False))
    frame = pd.DataFrame({name: np.concatenate(of_column) for name, of_column in batches.items()})
    units = {name: unit for name, unit in column_units(schema).items() if unit}
    frame.attrs.update({"units": units} if units else {})
    return frame


class Batches:
    """Passes rows on in batches of `BATCH`, whatever the sizes they come in."""

    def __init__(self, file: TableFile) -> None:
        self._file = file
        self._columns: list[Columns] = []
        self._rows = 0

    def write(self, columns: Columns, polygons: Polygons | None) -> None:
        """Add rows; those with polygons are passed on as they are, since text has no batches."""
        if polygons is not None:
            self._file.write(columns, polygons)
            return
        self._columns.append(columns)
        self._rows += len(columns["label"])
        if self._rows >= BATCH:
            self._flush(self._rows // BATCH * BATCH)

    def close(self) -> None:
        """Write what is left, and complete the file."""
        if self._rows:
            self._flush(self._rows)
        self._file.close()

    def _flush(self, rows: int) -> None:
        joined = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
        for start in range(0, rows, BATCH):
            self._file.write({name: values[start : min(start + BATCH, rows)] for name, values in joined.items()}, None)
        self._columns, self._rows = [{name: values[rows:] for name, values in joined.items()}], self._rows - rows


def column_units(schema: TableSchema) -> dict[str, str]:
    """Return the unit of each column, empty where there is none or none is known."""
    of_axis = dict(zip(schema.axes, schema.units, strict=True))
    common = schema.units[0] if len(set(schema.units)) == 1 else ""
    units = dict.fromkeys(schema.dtypes, "")
    units |= {name: unit for axis, unit in of_axis.items() if (name := f"centroid_{axis}") in units}
    power = f"^{len(schema.axes)}" if len(schema.axes) > 1 else ""
    units |= {"area": f"{common}{power}"} if common and "area" in units else {}
    lengths = [n for n in units if n == "equivalent_diameter" or (n.startswith("axis_") and n.endswith("_length"))]
    return units | dict.fromkeys(lengths, common)


FORMATS: Mapping[str, tuple[Callable[[Path, TableSchema], TableFile], str | None, str]] = {
    ".parquet": (ParquetFile, "pyarrow", "objects"),
    ".csv": (CsvFile, None, ""),
    ".geojson": (GeoJsonFile, None, ""),
    ".h5ad": (AnnDataFile, "h5py", "objects"),
}
"""By ending: what writes the file, the library that it needs, and the extra that this library is in."""


def check_format(name: str) -> str:
    """Return the ending of the name of a file, checked.

    Raises:
        ValueError: when no format has it, or its library is not installed.
    """
    suffix = next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"output must end in {', '.join(FORMATS)}, or be None for a data frame, got {name!r}")
    _, library, extra = FORMATS[suffix]
    if library is not None:
        import_extra(library, extra, f"writing {name}")
    return suffix


def open_file(path: Path, name: str, schema: TableSchema, limit: int) -> TableFile:
    """Open the file at a path for a table of a name, or for a data frame of so many bytes where it has no ending."""
    suffix = next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)
    return FrameFile(path, schema, limit) if suffix is None else FORMATS[suffix][0](path, schema)


def properties_for(
    suffix: str | None, properties: Sequence[str], *, has_intensity: bool, has_classes: bool = False
) -> tuple[str, ...]:
    """Return the properties that are computed for a format.

    AnnData needs the centroid, and the mean of channels; the classes of an intensity need its bounds.
    """
    needed = ["centroid"] if suffix == ".h5ad" else []
    some = [name for name in properties if name in INTENSITY_PROPERTIES]
    needed += ["mean"] if suffix == ".h5ad" and has_intensity and some else []
    needed += ["min", "max"] if has_intensity and has_classes else []
    return (*properties, *(name for name in needed if name not in properties))
