"""`exfm checkpoint`: look at commits and snapshots, check, compare, keep, merge and export them."""

from pathlib import PurePath
from typing import Annotated, Any

import typer

from exfm.data.errors import UserError

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at, check, compare, keep, merge and export checkpoints.")

WHERE = "a run's folder, a folder of checkpoints or snapshots, or such a URL"
Folder = Annotated[str, typer.Argument(metavar="PATH", help=WHERE)]
One = Annotated[
    str, typer.Argument(metavar="PATH[/step=N]", help=f"{WHERE}; /step=00000012 or /slice=000017 says which, else the newest")
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
GB = 10**9


def _output() -> Any:
    from exfm.launch import cli  # which imports this file

    return cli


def _print(as_json: bool, value: Any, lines: list[str]) -> None:
    if as_json:
        _output()._print(value)
    else:
        print("\n".join(lines))


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Aligned lines. columns: key -> heading; numbers stand to the right."""
    shown = [list(columns.values())] + [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in shown) for i in range(len(columns))]
    right = [all(type(row.get(key)) in (int, float, type(None)) for row in rows) for key in columns]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in shown
    ]


def _cell(value: Any) -> str:
    if value is None or value is False:
        return "-"
    if value is True:
        return "yes"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    # what somebody else wrote must not command the terminal
    return "".join(c if c.isprintable() else "?" for c in text)


@checkpoint_app.command("list")
def list_(path: Folder, as_json: Json = False) -> None:
    """One line per commit, oldest first; reads manifests only."""
    from exfm.launch.checkpoints import list_all, place

    rows = list_all(place(path))
    columns = ["name", "kind", "base", "slice", "consumed", "examples", "bytes", "ranks", "pinned", "problem"]
    _print(as_json, rows, _table(rows, {c: c for c in columns}))


@checkpoint_app.command()
def show(path: One, as_json: Json = False) -> None:
    """What one commit is, holds and was written by."""
    from exfm.launch.checkpoints import place
    from exfm.launch.checkpoints import show as look

    found = look(place(path))
    lines = [f"{key}: {_cell(found[key])}" for key in found if not isinstance(found[key], dict | list)]
    for key in ("position", "of", "written_by"):
        lines += [f"{key}: " + ", ".join(f"{k} {_cell(v)}" for k, v in found.get(key, {}).items())]
    lines += ["", "config, where it is not the default:", *_leaves(found["config"])]
    plan = [row | {"shards": len(row.get("shards", []))} for row in found.get("plan", []) if isinstance(row, dict)]
    if plan:
        lines += ["", *_table(plan, {c: c for c in ("table", "sharding_type", "compute_kernel", "ranks", "shards")})]
    lines += ["", *_table(found["files"], {"path": "file", "bytes": "bytes"}), ""]
    tensors = [{"name": name} | t for name, t in found["tensors"].items()]
    lines += _table(
        tensors, {"name": "tensor", "dtype": "dtype", "shape": "shape", "bytes": "bytes", "chunks": "chunks"}
    )
    _print(as_json, found, lines)


def _leaves(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for k, v in value.items() for line in _leaves(v, f"{key}.{k}" if key else str(k))]
    return [f"  {_cell(key)}: {_cell(value)}"]


@checkpoint_app.command()
def verify(
    path: One, all_: Annotated[bool, typer.Option("--all", help="every commit there")] = False, as_json: Json = False
) -> None:
    """Read every byte of a commit and of all it rests on; exit code 1 and the file's name where one is damaged."""
    from exfm.launch.checkpoints import place
    from exfm.launch.checkpoints import verify as check

    result = check(place(path), all_, _output().Bars())
    bad = [c for c in result["commits"] if c["problem"]]
    lines = [f"{c['name']}: {_cell(c['problem']) if c['problem'] else 'good'}" for c in result["commits"]]
    lines.append(f"{result['bytes']:,} bytes in {result['seconds']:.2f} s, {result['gb_per_s']:.2f} GB/s")
    _print(as_json, result, lines)
    raise typer.Exit(1 if bad else 0)


@checkpoint_app.command()
def diff(a: One, b: One, as_json: Json = False) -> None:
    """What differs between two commits: tensors by rows, whatever their sharding, position, config, versions."""
    from exfm.launch.checkpoint_diff import diff as compare
    from exfm.launch.checkpoints import place

    result = compare(place(a), place(b), _output().Bars())
    columns = ["name", "only_in", "shape", "dtype", "rows", "rows_differ", "max_abs", "l2"]
    lines = _table(result["tensors"], {c: c for c in columns}) if result["tensors"] else []
    lines += [f"{_cell(d['key'])}: {_cell(d['a'])} -> {_cell(d['b'])}" for d in result["fields"]]
    lines.append(
        f"{result['compared']} tensors compared, {len(result['tensors'])} differ" if lines else "no difference"
    )
    _print(as_json, result, lines)


@checkpoint_app.command()
def prune(
    path: Folder,
    keep: Annotated[int, typer.Option(min=1, help="newest commits kept")] = 2,
    keep_every: Annotated[int, typer.Option(min=0, help="also the first commit of every so many slices; 0: none")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    as_json: Json = False,
) -> None:
    """Remove old commits; never pinned ones, those being read on this machine, or what others rest on."""
    from exfm.launch.checkpoints import place
    from exfm.launch.checkpoints import prune as clean

    console = _output().console
    result = clean(place(path), keep, keep_every, dry_run, lambda text: console.print(text, markup=False))
    word = "would be removed" if dry_run else "removed"
    lines = [f"{name} {word}" for name in result["removed"]]
    lines.append(f"{len(result['removed'])} {word}, {result['bytes']:,} bytes; {len(result['kept'])} stay")
    _print(as_json, result, lines)


@checkpoint_app.command()
def pin(path: One, as_json: Json = False) -> None:
    """Keep a commit whatever retention says."""
    _pin(path, True, as_json)


@checkpoint_app.command()
def unpin(path: One, as_json: Json = False) -> None:
    """Let retention decide again."""
    _pin(path, False, as_json)


def _pin(path: str, on: bool, as_json: bool) -> None:
    from exfm.launch.checkpoints import pin as set_pin
    from exfm.launch.checkpoints import place

    result = set_pin(place(path), on)
    _print(as_json, result, [f"{result['name']} is {'pinned' if on else 'no longer pinned'}"])


@checkpoint_app.command("compact")
def compact(path: One, as_json: Json = False) -> None:
    """Write a full commit and the deltas on it as one full commit; refused while a job runs there."""
    from exfm.launch.checkpoints import merge, place

    result = merge(place(path))
    _print(as_json, result, [f"{result['name']}: {result['bytes']:,} bytes, of {', '.join(result['of'])}"])


@checkpoint_app.command()
def export(
    path: One,
    out: Annotated[str, typer.Argument(help="a new folder or URL")],
    tables: Annotated[str, typer.Option(help="safetensors or parquet")] = "safetensors",
    rows_per_file: Annotated[int, typer.Option(help="rows of a table per file")] = 10_000_000,
    adagrad_sums: Annotated[bool, typer.Option("--adagrad-sums", help="with the tables' Adagrad sums")] = False,
    as_json: Json = False,
) -> None:
    """Write the dense part as safetensors and tables as safetensors or Parquet files for other programs."""
    from exfm.launch.checkpoint_export import export as write
    from exfm.launch.checkpoints import place

    if tables not in ("safetensors", "parquet"):
        raise UserError(f"--tables is '{tables}'; use safetensors or parquet")
    form: Any = tables
    result = write(place(path), out, form, rows_per_file, adagrad_sums, _output().Bars())
    files = sum(len(t["files"]) for t in result["tables"].values())
    shown = f"{PurePath(out)}" if "://" not in out else out
    lines = [
        f"{shown}: {len(result['dense']['tensors'])} dense tensors, {len(result['tables'])} tables in {files} files"
    ]
    _print(as_json, result, lines)
