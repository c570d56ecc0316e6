"""MovieLens-1M as its publisher packs it, or as one Parquet file: reading either into the same table, and the download."""

import hashlib
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from exfm.data.cut import Progress
from exfm.data.errors import UserError

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MD5 = "c4d9eecfca2ab87c1945afe126590906"
TIMEOUT_S = 10.0
DAT_FILES = ("users.dat", "movies.dat", "ratings.dat")
REMEDY = "name the unpacked ml-1m folder (users.dat, movies.dat, ratings.dat) or an events.parquet of it"

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
AGES = (1, 18, 25, 35, 45, 50, 56)
GENDERS = ("F", "M")

EVENT_TYPES: dict[str, pa.DataType] = {
    "timestamp": pa.int64(), "user_id": pa.int64(), "movie_id": pa.int64(), "rating": pa.int64(), "gender": pa.int64(),
    "age": pa.int64(), "occupation": pa.int64(), "zip3": pa.int64(), "genres": pa.list_(pa.int64()), "year": pa.int64(),
}  # fmt: skip


def read_events(source: str | os.PathLike[str]) -> pa.Table:
    """All ratings with the columns of EVENT_TYPES, sorted by timestamp, user, movie. UserError for an unfit source."""
    path = _find(Path(source))
    table = _read_parquet(path) if path.suffix == ".parquet" else _read_dat(path)
    for name in EVENT_TYPES:
        if table.column(name).null_count:
            raise UserError(f"{path}: column '{name}' has {table.column(name).null_count} nulls; get the file again")
    ratings = table.column("rating").to_numpy()
    if len(ratings) == 0 or ratings.min() < 1 or ratings.max() > 5:
        raise UserError(f"{path}: {len(ratings)} ratings, which must be some and all 1 to 5; {REMEDY}")
    keys = [table.column(name).to_numpy() for name in ("movie_id", "user_id", "timestamp")]
    order = np.lexsort(keys)
    return table if (np.diff(order) == 1).all() else table.take(pa.array(order))


def _find(source: Path) -> Path:
    """The Parquet file, or the folder of .dat files, that a source stands for."""
    if source.is_file() and source.suffix == ".parquet":
        return source
    for folder in (source, source / "ml-1m", source / "ml1m"):
        if all((folder / name).is_file() for name in DAT_FILES):
            return folder
        if (folder / "events.parquet").is_file():
            return folder / "events.parquet"
    what = "does not exist" if not source.exists() else "is not MovieLens-1M"
    raise UserError(f"source {source} {what}; {REMEDY}, or download it first")


def _read_parquet(path: Path) -> pa.Table:
    try:
        found = pq.read_schema(path)
        if missing := [name for name in EVENT_TYPES if name not in found.names]:
            raise UserError(f"{path} lacks column(s) {', '.join(missing)}, it is not MovieLens-1M; {REMEDY}")
        return pq.read_table(path, columns=list(EVENT_TYPES)).cast(pa.schema(EVENT_TYPES))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is corrupt, truncated or not MovieLens-1M ({error}); {REMEDY}") from None


def _read_dat(folder: Path) -> pa.Table:
    users = _users(
        _fields(folder / "users.dat", {"user_id": "i", "gender": "s", "age": "i", "occupation": "i", "zip": "s"})
    )
    movies = _movies(_fields(folder / "movies.dat", {"movie_id": "i", "title": "s", "genres": "s"}))
    ratings = _fields(folder / "ratings.dat", {"user_id": "i", "movie_id": "i", "rating": "i", "timestamp": "i"})
    columns = {name: ratings.column(name) for name in ratings.column_names}
    for table, key in ((users, "user_id"), (movies, "movie_id")):
        row = pc.index_in(ratings.column(key), value_set=table.column(key).combine_chunks())
        if row.null_count:
            stray = ratings.column(key).filter(pc.is_null(row))[0]
            raise UserError(f"{folder}/ratings.dat: {key} {stray} is in no other file; unpack ml-1m.zip again")
        columns |= {name: table.column(name).take(row) for name in table.column_names if name != key}
    return pa.table({name: columns[name] for name in EVENT_TYPES}, schema=pa.schema(EVENT_TYPES))


def _fields(path: Path, types: dict[str, str]) -> pa.Table:
    """A `::`-separated latin-1 file. types: column name to i (integer) or s (text)."""
    text = path.read_bytes()
    if b"\x1f" in text:
        raise UserError(f"{path} is not a text file of MovieLens-1M; unpack ml-1m.zip again")
    try:
        return pa.csv.read_csv(
            pa.BufferReader(text.replace(b"::", b"\x1f")),
            read_options=pa.csv.ReadOptions(column_names=list(types), encoding="latin1"),
            parse_options=pa.csv.ParseOptions(delimiter="\x1f", quote_char=False),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.int64() if t == "i" else pa.string() for name, t in types.items()}
            ),
        )
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}); unpack ml-1m.zip again") from None


def _users(users: pa.Table) -> pa.Table:
    coded = {"user_id": users.column("user_id"), "occupation": users.column("occupation")}
    for name, known in (("gender", pa.array(GENDERS)), ("age", pa.array(AGES, pa.int64()))):
        code = pc.index_in(users.column(name), value_set=known)
        if code.null_count:
            stray = users.column(name).filter(pc.is_null(code))[0]
            raise UserError(f"users.dat: {name} '{stray}' is not one of {known.to_pylist()}; unpack ml-1m.zip again")
        coded[name] = code.cast(pa.int64())
    digits = [re.match(r"\d{1,3}", zip_code) for zip_code in users.column("zip").to_pylist()]
    return pa.table(coded | {"zip3": pa.array([int(d[0]) if d else 0 for d in digits], pa.int64())})


def _movies(movies: pa.Table) -> pa.Table:
    codes = {name: code for code, name in enumerate(GENRES)}
    genres, years = [], []
    rows = zip(*(movies.column(name).to_pylist() for name in ("movie_id", "title", "genres")), strict=True)
    for movie, title, names in rows:
        year = re.search(r"\((\d{4})\)\s*$", title)
        unknown = [name for name in names.split("|") if name not in codes]
        if year is None or unknown:
            raise UserError(
                f"movies.dat: movie {movie} '{title}' {names}: a year in brackets and known genres are needed; unpack "
                "ml-1m.zip again"
            )
        years.append(int(year[1]))
        genres.append([codes[name] for name in names.split("|")])
    return pa.table(
        {
            "movie_id": movies.column("movie_id"),
            "genres": pa.array(genres, pa.list_(pa.int64())),
            "year": pa.array(years),
        }
    )


def download(folder: str | os.PathLike[str], progress: Progress | None = None, url: str = URL, md5: str = MD5) -> Path:
    """Fetch MovieLens-1M from its publisher into folder/ml-1m and return that; what is already there is kept.

    progress counts bytes. UserError when the network or the file fails, OSError when the disk does.
    """
    folder = Path(folder)
    target = folder / "ml-1m"
    if all((target / name).is_file() for name in DAT_FILES):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"ml-1m.zip.tmp.{os.getpid()}"
    try:
        _fetch(url, archive, md5, progress)
        _unpack(archive, target)
    finally:
        archive.unlink(missing_ok=True)
    return target


def _fetch(url: str, archive: Path, md5: str, progress: Progress | None) -> None:
    found = hashlib.md5(usedforsecurity=False)
    by_hand = f"or download {url} by hand, unpack it and name its folder as the source"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(archive, "wb") as f:
            total, done = int(answer.headers.get("Content-Length") or 0), 0
            while block := answer.read(1 << 16):
                f.write(block)
                found.update(block)
                done += len(block)
                if progress:
                    progress("downloading ml-1m.zip", done, max(total, done))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"cannot download {url} ({error}); check the network, {by_hand}") from None
    if found.hexdigest() != md5:
        raise UserError(f"{url} has md5 {found.hexdigest()}, its publisher says {md5}; try again, {by_hand}")


def _unpack(archive: Path, target: Path) -> None:
    """Write the three data files alone, by our own names, so that no path in the archive is followed; ratings.dat last."""
    target.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in DAT_FILES:
                temporary = target / f"{name}.tmp.{os.getpid()}"
                temporary.write_bytes(packed.read(f"ml-1m/{name}"))
                os.replace(temporary, target / name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the archive is not MovieLens-1M ({error}); try again") from None
