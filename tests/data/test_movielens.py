"""MovieLens-1M: both source forms, histories against a per-event reference, and the download."""

import hashlib
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data.errors import UserError
from exfm.data.manifest import Stream
from exfm.data.movielens import HISTORY, MAX_GAP_S, prepare
from exfm.data.movielens_files import AGES, EVENT_TYPES, GENDERS, GENRES, download
from exfm.data.source import AlignedFiles, SliceSource


def some_events(n: int = 900, num_users: int = 7, num_movies: int = 60, span_s: int = 400) -> list[dict]:
    """Unsorted ratings, many in the same second, at most one of a user and movie."""
    rng = np.random.default_rng(3)
    users = [
        {"user_id": u, "gender": u % 2, "age": u % 7, "occupation": u % 21, "zip3": 100 + u}
        for u in range(1, num_users + 1)
    ]
    movies = [
        {"movie_id": m, "genres": sorted({m % 18, (m * 7) % 18}), "year": 1930 + m} for m in range(1, num_movies + 1)
    ]
    pairs = rng.permutation(num_users * num_movies)[:n]
    events = []
    for pair in pairs.tolist():
        facts = users[pair % num_users] | movies[pair // num_users]
        stamp = 956_703_932 + int(rng.integers(span_s)) * (1 if pair % 3 else 40_000)
        events.append(facts | {"rating": int(rng.integers(1, 6)), "timestamp": stamp})
    return events


def write_parquet(path: Path, events: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(events, pa.schema(EVENT_TYPES)), path)
    return path


def write_dat(folder: Path, events: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    users = {
        e[
            "user_id"
        ]: f"{e['user_id']}::{GENDERS[e['gender']]}::{AGES[e['age']]}::{e['occupation']}::{e['zip3']}67-1234\n"
        for e in events
    }
    movies = {
        e["movie_id"]: f'{e["movie_id"]}::"Tout: ça", l\'été {e["movie_id"]} ({e["year"]})::'
        + "|".join(GENRES[g] for g in e["genres"])
        + "\n"
        for e in events
    }
    ratings = [f"{e['user_id']}::{e['movie_id']}::{e['rating']}::{e['timestamp']}\n" for e in events]
    for name, lines in (("users", users.values()), ("movies", movies.values()), ("ratings", ratings)):
        (folder / f"{name}.dat").write_text("".join(lines), encoding="latin1")
    return folder


def rows_of(stream: Stream) -> list[dict]:
    """Every example of a stream, features and labels, in order."""
    rows = []
    for index in range(stream.info.num_slices or 0):
        for group in zip(*(_tables(stream, index, kind) for kind in ("features", "labels")), strict=True):
            rows += [a | {f"label_{k}": v for k, v in b.items()} for a, b in zip(*group, strict=True)]
    return rows


def _tables(stream: Stream, index: int, kind: str) -> list[list[dict]]:
    manifest = stream.manifest(index, kind)  # type: ignore[arg-type]
    assert manifest is not None
    files = AlignedFiles(stream.fs, f"{stream.root}/slice={index:06d}/{kind}", manifest, ())
    names = stream.schema.feature_types() if kind == "features" else stream.schema.label_types()
    source = SliceSource([files], stream.schema.id)
    return [source.read(files, g, list(names)).to_pylist() for g in range(source.num_groups)]


def expected(events: list[dict]) -> list[dict]:
    """The examples by the definition, one event at a time."""
    order = sorted(events, key=lambda e: (e["timestamp"], e["user_id"], e["movie_id"]))
    by_user, by_movie, rows = defaultdict(list), defaultdict(list), []
    for number, event in enumerate(order):
        past = [e for e in by_user[event["user_id"]] if e["timestamp"] < event["timestamp"]]
        seen = [e for e in by_movie[event["movie_id"]] if e["timestamp"] < event["timestamp"]]
        likes = [e["movie_id"] for e in past if e["rating"] >= 4]
        dislikes = [e["movie_id"] for e in past if e["rating"] < 4]
        row = {name: event[name] for name in EVENT_TYPES if name != "rating"}
        row |= {
            "example_id": number,
            "liked_movies": likes[::-1][:HISTORY],
            "disliked_movies": dislikes[::-1][:HISTORY],
            "num_liked": len(likes),
            "num_disliked": len(dislikes),
            "like_rate": np.float32((len(likes) + 1) / (len(past) + 2)),
            "movie_count": len(seen),
            "movie_like_rate": np.float32((sum(e["rating"] >= 4 for e in seen) + 1) / (len(seen) + 2)),
            "seconds_since_last": min(event["timestamp"] - past[-1]["timestamp"], MAX_GAP_S) if past else 0,
            "label_liked": float(event["rating"] >= 4),
        }
        by_user[event["user_id"]].append(event)
        by_movie[event["movie_id"]].append(event)
        rows.append(row)
    return rows


def digests(stream: Stream) -> list[str]:
    manifests = [stream.wait(i, kind, 0) for i in range(stream.info.num_slices or 0) for kind in ("features", "labels")]
    return [m.digest() for m in manifests]


def test_every_column_is_what_the_definition_gives_event_by_event(tmp_path):
    events = some_events()
    stream = prepare(write_parquet(tmp_path / "events.parquet", events), str(tmp_path / "out"), num_slices=7)
    wanted = expected(events)
    assert any(len(row["liked_movies"]) == HISTORY for row in wanted)
    assert any(row["seconds_since_last"] == MAX_GAP_S for row in wanted)
    assert rows_of(stream) == wanted


def test_rating_is_no_feature_and_the_label_lies_apart(tmp_path):
    stream = prepare(write_parquet(tmp_path / "events.parquet", some_events()), str(tmp_path / "out"), num_slices=2)
    part = "slice=000000/features/part-00000.parquet"
    names = pq.read_schema(f"{stream.root}/{part}").names
    assert "rating" not in names and "liked" not in names and "label" not in names


def test_dat_files_and_parquet_give_identical_streams(tmp_path):
    events = some_events()
    one = prepare(write_parquet(tmp_path / "ml1m/events.parquet", events).parent.parent, str(tmp_path / "a"), 5)
    two = prepare(write_dat(tmp_path / "unpacked/ml-1m", events).parent, str(tmp_path / "b"), 5)
    assert digests(one) == digests(two)
    assert one.info == two.info


def test_slices_tile_the_time_and_no_second_is_split(tmp_path):
    stream = prepare(write_parquet(tmp_path / "events.parquet", some_events()), str(tmp_path / "out"), num_slices=9)
    manifests = [stream.wait(i, "features", 0) for i in range(9)]
    assert [m.t1 for m in manifests[:-1]] == [m.t0 for m in manifests[1:]]
    for manifest in manifests:
        stamps = pq.read_table(f"{stream.root}/slice={manifest.slice:06d}/features/part-00000.parquet")["timestamp"]
        assert manifest.t0 <= min(stamps.to_pylist()) and max(stamps.to_pylist()) < manifest.t1


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("ratings.dat", "1::59::9::956703932\n", "1 to 5"),
        ("ratings.dat", "99::1::3::956703932\n", "user_id 99 is in no other file"),
        ("ratings.dat", "1::999::3::956703932\n", "movie_id 999 is in no other file"),
        ("ratings.dat", "1::2\n", "ratings.dat is damaged"),
        ("ratings.dat", "1::x::3::956703932\n", "ratings.dat is damaged"),
        ("users.dat", "500::X::25::3::12345\n", "gender 'X'"),
        ("users.dat", "500::M::26::3::12345\n", "age '26'"),
        ("movies.dat", "500::No year::Drama\n", "500 'No year'"),
        ("movies.dat", "500::New (2000)::Anime\n", "Anime"),
    ],
)
def test_a_wrong_line_is_refused_by_name(tmp_path, name, line, message):
    folder = write_dat(tmp_path / "ml-1m", some_events())
    with open(folder / name, "a", encoding="latin1") as f:
        f.write(line)
    with pytest.raises(UserError, match=message):
        prepare(folder, str(tmp_path / "out"), 3)


def test_a_missing_wrong_or_truncated_source_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist.*users\.dat"):
        prepare(tmp_path / "nowhere", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"is not MovieLens-1M.*users\.dat"):
        prepare(tmp_path, str(tmp_path / "out"))
    pq.write_table(pa.table({"user_id": [1], "rating": [3]}), tmp_path / "events.parquet")
    with pytest.raises(UserError, match=r"lacks column.*timestamp"):
        prepare(tmp_path, str(tmp_path / "out"))
    whole = write_parquet(tmp_path / "events.parquet", some_events()).read_bytes()
    (tmp_path / "events.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"events\.parquet is corrupt, truncated"):
        prepare(tmp_path, str(tmp_path / "out"))


def test_a_prepared_folder_is_never_written_over(tmp_path):
    source = write_parquet(tmp_path / "events.parquet", some_events())
    stream = prepare(source, str(tmp_path / "out"), 3)
    before = digests(stream)
    with pytest.raises(UserError, match="already holds a stream; use an empty folder"):
        prepare(source, str(tmp_path / "out"), 4)
    assert digests(stream) == before


def archive(path: Path, events: list[dict]) -> tuple[str, str]:
    """A zip like the publisher's, with a file that tries to get out; (url, md5)."""
    folder = write_dat(path.parent / "made", events)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("../escaped.dat", "no")
        packed.writestr("ml-1m/README", "about")
        for name in ("users", "movies", "ratings"):
            packed.write(folder / f"{name}.dat", f"ml-1m/{name}.dat")
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


def test_a_download_is_checked_unpacked_and_reported(tmp_path):
    url, md5 = archive(tmp_path / "ml-1m.zip", some_events())
    seen = []
    target = download(tmp_path / "deep/data", lambda *step: seen.append(step), url, md5)
    assert sorted(p.name for p in target.iterdir()) == ["movies.dat", "ratings.dat", "users.dat"]
    assert [p.name for p in target.parent.iterdir()] == ["ml-1m"] and not list(tmp_path.rglob("escaped.dat"))
    size = (tmp_path / "ml-1m.zip").stat().st_size
    assert seen[-1] == ("downloading ml-1m.zip", size, size)
    assert download(tmp_path / "deep/data", None, "file:///nowhere", md5) == target
    assert prepare(target.parent, str(tmp_path / "out"), 3).info.num_slices == 3


def test_a_failed_download_leaves_nothing_behind_and_says_what_to_do(tmp_path):
    url, md5 = archive(tmp_path / "ml-1m.zip", some_events())
    with pytest.raises(UserError, match=r"its publisher says 0123.*by hand"):
        download(tmp_path / "data", None, url, "0123")
    with pytest.raises(UserError, match=r"cannot download.*check the network.*by hand"):
        download(tmp_path / "data", None, "http://127.0.0.1:9/ml-1m.zip", md5)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.data
def test_the_real_ratings_become_fifty_slices_with_the_known_label_rate(ml1m_source, tmp_path):
    stream = prepare(ml1m_source, str(tmp_path / "out"))
    rows = [stream.wait(i, "features", 0).rows for i in range(50)]
    assert sum(rows) == 1_000_209 and max(rows) - min(rows) < 200
    labels = np.concatenate(
        [pq.read_table(p)["liked"].to_numpy() for p in Path(stream.root).glob("slice=*/labels/*.parquet")]
    )
    assert abs(labels.mean() - 0.5752) < 1e-4
