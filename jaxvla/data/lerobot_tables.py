"""The tables of a LeRobot data set: what its meta/ says of episodes, and columns of its data."""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_VERSIONS = {"v2.0": 2, "v2.1": 2, "v3.0": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeEntry:
    """Where an episode lies."""

    index: int
    """Its number in the data set."""
    length: int
    """Frames."""
    data_file: pathlib.Path
    first_row: int
    """Its first row in that file."""
    videos: dict[str, tuple[pathlib.Path, float]]
    """Camera -> file, and seconds in it at which the episode begins."""


def require_pyarrow() -> None:
    """Raises ValueError when pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError("LeRobot data sets need pyarrow: pip install 'jaxvla[data]'") from error


def read_info(root: pathlib.Path) -> dict[str, Any]:
    """meta/info.json.

    Raises:
      ValueError: it is missing, damaged, or of a layout that is not read.
    """
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version, required = info["codebase_version"], ("fps", "features", "data_path")
        missing = [name for name in required if name not in info]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no LeRobot index: {error!r}") from error
    if version not in _VERSIONS:
        raise ValueError(f"{path}: layout {version!r} is none of {', '.join(_VERSIONS)}")
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return info


def read_tasks(root: pathlib.Path, info: dict[str, Any]) -> dict[int, str]:
    """task_index -> instruction.

    Raises:
      ValueError: the file is missing or damaged.
    """
    meta = root / "meta"
    if _VERSIONS[info["codebase_version"]] == 2:
        try:
            return {int(x["task_index"]): str(x["task"]) for x in _json_lines(meta / "tasks.jsonl")}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{meta / 'tasks.jsonl'}: a task lacks {error}") from error
    table = _read_table(meta / "tasks.parquet")
    # pandas wrote it with the sentences as index: their column is the one that is no number.
    texts = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise ValueError(f"{meta / 'tasks.parquet'} has columns {table.column_names}")
    numbers = table.column("task_index").to_pylist()
    return dict(zip(numbers, map(str, table.column(texts[0]).to_pylist()), strict=True))


def read_episodes(
    root: pathlib.Path, info: dict[str, Any], videos: Sequence[str]
) -> list[EpisodeEntry]:
    """All episodes by their numbers.

    Args:
      root: directory of the data set.
      info: from `read_info`.
      videos: cameras that are videos.

    Raises:
      ValueError: an index file is missing or damaged, or there are no episodes.
    """
    is_old = _VERSIONS[info["codebase_version"]] == 2
    try:
        found = _episodes_v2(root, info, videos) if is_old else _episodes_v3(root, info, videos)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{root / 'meta'}: an episode's entry lacks {error}") from error
    if not found or min(entry.length for entry in found) < 1:
        raise ValueError(f"{root / 'meta'} speaks of no episodes, or of one without frames")
    return sorted(found, key=lambda entry: entry.index)


def _episodes_v2(
    root: pathlib.Path, info: dict[str, Any], videos: Sequence[str]
) -> list[EpisodeEntry]:
    found = []
    for line in _json_lines(root / "meta" / "episodes.jsonl"):
        index = int(line["episode_index"])
        names = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
        found.append(
            EpisodeEntry(
                index=index,
                length=int(line["length"]),
                data_file=root / info["data_path"].format(**names),
                first_row=0,
                videos={
                    key: (root / info["video_path"].format(video_key=key, **names), 0.0)
                    for key in videos
                },
            )
        )
    return found


def _episodes_v3(
    root: pathlib.Path, info: dict[str, Any], videos: Sequence[str]
) -> list[EpisodeEntry]:
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    rows = [row for path in files for row in _episode_rows(path, videos)]
    first_of: dict[pathlib.Path, int] = {}
    for row in rows:
        path = _data_file(root, info, row)
        first = int(row["dataset_from_index"])
        first_of[path] = min(first, first_of.get(path, first))

    def video(row: dict[str, Any], key: str) -> tuple[pathlib.Path, float]:
        at = {name: int(row[f"videos/{key}/{name}"]) for name in ("chunk_index", "file_index")}
        path = root / info["video_path"].format(video_key=key, **at)
        return path, float(row[f"videos/{key}/from_timestamp"])

    return [
        EpisodeEntry(
            index=int(row["episode_index"]),
            length=int(row["length"]),
            data_file=_data_file(root, info, row),
            first_row=int(row["dataset_from_index"]) - first_of[_data_file(root, info, row)],
            videos={key: video(row, key) for key in videos},
        )
        for row in rows
    ]


def _data_file(root: pathlib.Path, info: dict[str, Any], row: dict[str, Any]) -> pathlib.Path:
    at = {name: int(row[f"data/{name}"]) for name in ("chunk_index", "file_index")}
    return root / info["data_path"].format(**at)


def _episode_rows(path: pathlib.Path, videos: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of one file of meta/episodes, without the statistics that lie beside them."""
    names = ["episode_index", "length", "dataset_from_index"]
    names += ["data/chunk_index", "data/file_index"]
    for key in videos:
        names += [f"videos/{key}/{x}" for x in ("chunk_index", "file_index", "from_timestamp")]
    table = _read_table(path, names)
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return table.select(names).to_pylist()


def read_columns(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Numeric columns of a data file, each [n] or, of vectors, [n, D].

    Raises:
      ValueError: the file cannot be read, or lacks one of them.
    """
    table = _read_table(path, names)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return {name: _numbers(table.column(name)) for name in names}


def open_parquet(path: pathlib.Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, its pages mapped into memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def row_group(file: Any, row: int) -> tuple[int, int]:
    """(row group that holds a row of a ParquetFile, first row of that group)."""
    first = 0
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if row < first + length:
            return group, first
        first += length
    raise ValueError(f"row {row} of {first}")


def _numbers(column: Any) -> np.ndarray:
    """[n] of numbers, or [n, D] of lists."""
    import pyarrow

    array = column.combine_chunks()
    if isinstance(array, pyarrow.ChunkedArray):  # of no or of several chunks
        array = pyarrow.concat_arrays(array.chunks)
    kind = array.type
    is_nested = pyarrow.types.is_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not (is_nested or pyarrow.types.is_large_list(kind)):
        return array.to_numpy(zero_copy_only=False)[:, None]
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)


def _read_table(path: pathlib.Path, names: Sequence[str] | None = None) -> Any:
    """Columns of a parquet file, and those whose names begin like theirs."""
    import pyarrow

    with open_parquet(path) as file:
        try:
            return file.read(columns=None if names is None else list(names))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
