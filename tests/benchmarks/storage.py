"""Reading embeddings back, against the other ways to keep them: the same rows, and whatever of each format is fastest.

    python -m tests.benchmarks.storage [--rows 96]

A row is [256, 64, 64] float16 and leaves every reader as such an array: four embeddings by nano of real images, as one,
so that codecs find in it what there is to find.
cellray: a column of plain bytes among the others of a data set, one row a row group, by serve_app.dataset.
tensor, list: the same rows and columns as Parquet's FixedShapeTensor and as a list<float16>, not compressed, one row a
row group, by pyarrow. zarr: one array, a chunk a row, not compressed. npz: a file a row.
read: all rows in their order; random: one row, its file open and the footer read. CPU milliseconds of this process (all
its threads) a row, medians of ROUNDS rounds in which the formats take turns; files are in the system's cache.
random_row_mb: bytes that S3 (moto) sent for one row once the footer is known. footer_kb_row: the footer's own share.
none, snappy, lz4, zstd: the data set's file with its `embedding` column compressed so: size, against none, and CPU.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import settings
from cluster.settings import StorageSettings
from cluster.storage import Storage
from jobs import samples
from serve_app import commit, dataset, models
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.model import encoder, preprocess
from tests.benchmarks.nano import report
from tests.s3 import client, server

SHAPE = (256, 64, 64)
ROUNDS, RANDOM, REMOTE = 5, 24, 12
CODECS = ("none", "snappy", "lz4", "zstd")
WANTED = {"read_ms_row": 2.0, "random_row_mb": 3.0}
MB = 1e6
Array = np.ndarray


@dataclass(frozen=True)
class Format:
    """How rows are written into a folder, read in order, and read one by one from what `opened` gives."""

    write: Callable[[Path, list[Array]], None]
    read: Callable[[Path], Iterator[Array]]
    opened: Callable[[Path], Any]
    random: Callable[[Any, int], Array]


def rows(count: int) -> list[Array]:
    """float16 [256, 64, 64], no two alike."""
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as folder:
        paths = samples.write_samples(Path(folder), broken=False)
        decoded = [preprocess.decode(path.read_bytes(), 10**8) for path in paths]
    model = encoder.load(models.prepare(settings.load(environ={}), "nano"), "auto")
    made = [np.asarray(one) for one in encoder.embed(model, [preprocess.resize(one, 256).pixels for one in decoded])]
    rng = np.random.default_rng(0)
    parts = (rng.choice(len(made), 4, replace=False) for _ in range(count))
    return [np.block([[made[a], made[b]], [made[c], made[d]]]).astype(np.float16, order="C") for a, b, c, d in parts]


def table(array: Array, number: int) -> pa.Table:
    """One row of `embeddings`."""
    made = Embedding(f"{number:064d}", f"{number:064d}", "sam_vit_b", "0" * 64, (768, 1024), (768, 1024), array)
    return dataset.embedding_row(made, f"s3://plates/2026-11/{number:06d}.tif", made.pooled(16))


def write_cellray(folder: Path, made: list[Array]) -> None:
    metadata = {"fingerprint": "0" * 64, "encoder_sha256": "0" * 64}
    with ShardWriter(Storage(), str(folder), "embed", 0, metadata) as writer:
        for number, array in enumerate(made):
            writer.add(dataset.EMBEDDINGS, table(array, number))
        writer.commit()


def cellray_file(folder: Path) -> str:
    (path,) = folder.glob("embeddings/*.parquet")
    return str(path)


def read_cellray(folder: Path) -> Iterator[Array]:
    uri = cellray_file(folder)
    count = pq.read_metadata(uri).num_rows
    return (one.array for one in dataset.open_embeddings(Storage(), uri, list(range(count))))


def cellray_row(parquet: pq.ParquetFile, row: int) -> Array:
    return dataset.embedding_of(parquet.read_row_group(row).to_pylist()[0]).array


def parquet_of(column: Callable[[Array], pa.Array], values: Callable[[pa.Array], Array]) -> Format:
    """The same columns, with `embedding` of another type."""

    def write(folder: Path, made: list[Array]) -> None:
        folder.mkdir()
        writer = None
        for number, array in enumerate(made):
            row = table(array, number)
            row = row.set_column(row.schema.get_field_index("embedding"), "embedding", column(array))
            writer = writer or pq.ParquetWriter(
                folder / "rows.parquet", row.schema, compression="none", use_dictionary=False, write_statistics=False
            )
            writer.write_table(row, row_group_size=1)
        assert writer is not None
        writer.close()

    def read(folder: Path) -> Iterator[Array]:
        batches = pq.ParquetFile(folder / "rows.parquet").iter_batches(1, columns=["embedding"])
        return (values(batch.column("embedding")) for batch in batches)

    def random(parquet: pq.ParquetFile, row: int) -> Array:
        return values(parquet.read_row_group(row, ["embedding"])["embedding"].chunk(0))

    return Format(write, read, lambda folder: pq.ParquetFile(folder / "rows.parquet"), random)


def write_zarr(folder: Path, made: list[Array]) -> None:
    import zarr

    shape, chunks = (len(made), *SHAPE), (1, *SHAPE)
    array = zarr.create_array(folder, shape=shape, chunks=chunks, dtype="float16", compressors=None)
    for number, one in enumerate(made):
        array[number] = one


def open_zarr(folder: Path) -> Any:
    import zarr

    return zarr.open_array(folder, mode="r")


def read_zarr(folder: Path) -> Iterator[Array]:
    array = open_zarr(folder)
    return (array[number] for number in range(array.shape[0]))


def write_npz(folder: Path, made: list[Array]) -> None:
    folder.mkdir()
    for number, array in enumerate(made):
        np.savez(folder / f"{number:06d}.npz", embedding=array)


def npz_row(folder: Path, row: int) -> Array:
    return np.asarray(np.load(folder / f"{row:06d}.npz")["embedding"])


FORMATS = {
    "cellray": Format(write_cellray, read_cellray, lambda folder: pq.ParquetFile(cellray_file(folder)), cellray_row),
    "tensor": parquet_of(
        lambda array: pa.FixedShapeTensorArray.from_numpy_ndarray(array.reshape(1, *SHAPE)),
        lambda column: column.to_numpy_ndarray()[0],
    ),
    "list": parquet_of(
        lambda array: pa.ListArray.from_arrays(pa.array([0, array.size], pa.int32()), pa.array(array.ravel())),
        lambda column: column.flatten().to_numpy().reshape(SHAPE),
    ),
    "zarr": Format(write_zarr, read_zarr, open_zarr, lambda array, row: array[row]),
    "npz": Format(
        write_npz,
        lambda folder: (npz_row(folder, row) for row in range(len(list(folder.iterdir())))),
        lambda folder: folder,
        npz_row,
    ),
}


def cpu_ms(work: Callable[..., Any], count: int, *arguments: Any) -> float:
    """Of this process, for each of `count`."""
    start = time.process_time()
    work(*arguments)
    return 1000 * (time.process_time() - start) / count


def read_all(one: Format, folder: Path) -> None:
    for array in one.read(folder):
        assert array.shape == SHAPE


def read_some(one: Format, opened: Any, chosen: list[int]) -> None:
    for row in chosen:
        assert one.random(opened, row).shape == SHAPE


def on_disk(temporary: Path, made: list[Array]) -> dict[str, dict[str, float]]:
    """format: its figures."""
    found: dict[str, dict[str, float]] = {}
    for name, one in FORMATS.items():
        folder = temporary / name
        one.write(temporary / f"warm-{name}", made[:2])
        written = cpu_ms(one.write, len(made), folder, made)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert all(map(np.array_equal, one.read(folder), made)), name
        found[name] = {"write_ms_row": written, "mb_row": size / MB / len(made)}
    rng, times = np.random.default_rng(1), {name: np.zeros((ROUNDS, 2)) for name in FORMATS}
    for turn in range(ROUNDS):
        for name, one in FORMATS.items():
            opened, chosen = one.opened(temporary / name), rng.integers(0, len(made), RANDOM).tolist()
            times[name][turn, 0] = cpu_ms(read_all, len(made), one, temporary / name)
            times[name][turn, 1] = cpu_ms(read_some, RANDOM, one, opened, chosen)
    for name, both in times.items():
        found[name]["read_ms_row"], found[name]["random_ms_row"] = np.median(both, axis=0)
    return found


def counted(storage: Storage, uri: str) -> tuple[Any, list[int]]:
    """An open file on S3, and how much each of its requests brings."""
    file: Any = storage.open(uri)
    cache, sizes = file.file.cache, []
    fetch = cache.fetcher

    def counting(start: int, end: int) -> bytes:
        data: bytes = fetch(start, end)
        sizes.append(len(data))
        return data

    cache.fetcher = counting
    return file, sizes


def on_s3(temporary: Path, made: list[Array]) -> dict[str, dict[str, float]]:
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    found: dict[str, dict[str, float]] = {}
    with server(temporary) as endpoint:
        s3, storage = client(endpoint, "s3"), Storage(StorageSettings(endpoint_url=endpoint))
        s3.create_bucket(Bucket="rows")
        for name, one in FORMATS.items():
            for path in [
                path for path in (temporary / name).rglob("*") if path.is_file() and "_" not in path.parts[-2]
            ]:
                s3.put_object(Bucket="rows", Key=str(path.relative_to(temporary)), Body=path.read_bytes())
            chosen = np.random.default_rng(2).integers(0, len(made), REMOTE).tolist()
            if name in ("zarr", "npz"):  # a file or object a row
                brought = []
                for row in chosen:
                    key = f"{name}/c/{row}/0/0/0" if name == "zarr" else f"{name}/{row:06d}.npz"
                    file, sizes = counted(storage, f"s3://rows/{key}")
                    there = file.read() if name == "zarr" else np.load(io.BufferedReader(file, 1 << 16))["embedding"]
                    array = np.frombuffer(there, np.float16) if name == "zarr" else there.ravel()
                    assert np.array_equal(array, made[row].ravel()), name
                    brought.append(sum(sizes))
                found[name] = {"random_row_mb": float(np.mean(brought)) / MB}
                continue
            local = cellray_file(temporary / name) if name == "cellray" else str(temporary / name / "rows.parquet")
            file, sizes = counted(storage, f"s3://rows/{Path(local).relative_to(temporary)}")
            parquet = pq.ParquetFile(file)
            footer = sum(sizes)
            for row in chosen:
                assert np.array_equal(one.random(parquet, row), made[row]), name
            found[name] = {
                "random_row_mb": (sum(sizes) - footer) / REMOTE / MB,
                "footer_kb_row": footer / len(made) / 1e3,
            }
    return found


def write_compressed(path: Path, codec: str, made: list[Array]) -> None:
    schema = dataset.SCHEMAS[dataset.EMBEDDINGS]
    leaves = {leaf: codec if leaf == "embedding" else "zstd" for leaf in commit._leaves(schema)}
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, schema, compression=leaves, **options) as out:
        for number, array in enumerate(made):
            out.write_table(table(array, number), row_group_size=1)


def read_compressed(path: Path, count: int) -> None:
    for one in dataset.open_embeddings(Storage(), str(path), list(range(count))):
        assert one.array.shape == SHAPE


def on_codecs(temporary: Path, made: list[Array]) -> dict[str, dict[str, float]]:
    times, count = {codec: np.zeros((ROUNDS, 2)) for codec in CODECS}, len(made)
    for turn in range(ROUNDS):
        for codec in CODECS:
            path = temporary / f"{codec}.parquet"
            times[codec][turn, 0] = cpu_ms(write_compressed, count, path, codec, made)
            times[codec][turn, 1] = cpu_ms(read_compressed, count, path, count)
    found = {}
    for codec, both in times.items():
        written, read = np.median(both, axis=0)
        size = (temporary / f"{codec}.parquet").stat().st_size / (temporary / "none.parquet").stat().st_size
        found[codec] = {"write_ms_row": written, "read_ms_row": read, "size": size}
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    print(" " * 10 + "".join(f"{name:>15}" for name in names))
    for what, one in found.items():
        print(f"{what:10}" + "".join(f"{one[name]:15.3f}" if name in one else " " * 15 for name in names))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="of each format (default: %(default)s)")
    arguments = parser.parse_args()
    print("making the rows", file=sys.stderr, flush=True)
    made = rows(arguments.rows)
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        found = on_disk(Path(temporary), made)
        for name, one in on_s3(Path(temporary), made).items():
            found[name] |= one
        codecs = on_codecs(Path(temporary), made[:32])
    show(found)
    show(codecs)
    figures = dict(found["cellray"])
    for name in ("read_ms_row", "random_ms_row", "random_row_mb"):
        figures |= {f"{peer}_{name}": one[name] for peer, one in found.items() if peer != "cellray"}
    for codec in CODECS[1:]:
        figures |= {f"{codec}_{name}": value for name, value in codecs[codec].items()}
    report("storage", figures, WANTED)


if __name__ == "__main__":
    main()
