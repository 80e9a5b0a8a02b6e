"""The data card: what is in a data set, on which terms, and what was left out and why.

One HTML page with inline SVG plots: no script, no outside address, readable without a network. `card_fragment(out)`
gives the same content for embedding into another page; `write` is called by ingest.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from pipelines.checks import CODES
from pipelines.shard import SPLITS, ShardSet
from pipelines.store import Place, parquet

INK, ACCENT, WARM, GRID = "#1c2733", "#2a6f97", "#bc4b51", "#dfe5ea"
SPLIT_COLOURS = {"train": "#2a6f97", "valid": "#e09f3e", "test": "#7a9e7e"}

STYLE = """
.card{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1c2733;max-width:1080px;margin:0 auto}
.card h1{font-size:1.7rem;margin:.2em 0}.card h2{font-size:1.2rem;margin:2em 0 .6em;border-bottom:2px solid #dfe5ea}
.card .tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.card .tile{background:#f3f6f8;border-radius:10px;padding:12px 18px;min-width:110px}
.card .tile b{display:block;font-size:1.5rem;line-height:1.2}.card .tile span{color:#52616f;font-size:.85rem}
.card .plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:18px}
.card .key{margin:0 0 12px;color:#52616f;font-size:.9rem}
.card .key i{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin:0 .35em 0 1em}
.card figure{margin:0;background:#fff;border:1px solid #dfe5ea;border-radius:10px;padding:10px 12px}
.card figcaption{font-weight:600;margin-bottom:4px}.card svg{width:100%;height:auto;display:block}
.card table{border-collapse:collapse;width:100%;font-size:.92rem}
.card th,.card td{text-align:left;padding:5px 10px;border-bottom:1px solid #dfe5ea;vertical-align:top}
.card th{background:#f3f6f8}.card td.n,.card th.n{text-align:right;font-variant-numeric:tabular-nums}
.card code{background:#f3f6f8;border-radius:4px;padding:1px 5px;overflow-wrap:anywhere}
.card .scroll{max-height:26rem;overflow:auto;border:1px solid #dfe5ea;border-radius:10px}
"""


def write(
    root: Place, info: dict[str, Any], metas: Sequence[dict[str, Any]], rejects: Sequence[dict[str, Any]]
) -> None:
    """Write OUT/card/index.html for the set described by dataset.json's `info`, its tracks and its rejects."""
    body = _fragment(info, metas, rejects)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Data card</title>'
        f"</head><body style='background:#fff;margin:24px'>{body}</body></html>\n"
    )
    (root / "card" / "index.html").write(page.encode())


def card_fragment(out: str) -> str:
    """The data card of a finished set as an HTML fragment with its own style. Raises `UserError` when there is none."""
    data = ShardSet.open(out)
    rejects = parquet((data.root / "rejects.parquet").read()).to_pylist()
    return _fragment(data.info, [data.meta(i) for i in range(len(data))], rejects)


def _fragment(info: dict[str, Any], metas: Sequence[dict[str, Any]], rejects: Sequence[dict[str, Any]]) -> str:
    total = info["counts"]
    artists, works = {m["artist"] for m in metas}, {m["work"] for m in metas if m["work"]}
    tiles = [
        (f"{total['hours']:.2f} h", "of music"),
        (str(total["tracks"]), "tracks"),
        (str(len(artists)), "artists"),
        (str(len(works)), "works"),
        (f"{total['frames'] * info['codec']['num_codebooks'] / 1e6:.2f} M", "tokens"),
        (f"{total['rejects']} of {total['rows']}", "rows rejected"),
    ]
    tile_html = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    parts = [
        f"<style>{STYLE}</style><div class='card'><h1>Data card</h1>",
        f"<p>Data set version <code>{info['dataset_version'][:16]}</code>, rights decided on {info['rights_day']} for "
        f"the purpose {escape(', '.join(info['settings']['purpose']))} in the territory "
        f"{escape(', '.join(info['settings']['territory']))}.</p><div class='tiles'>{tile_html}</div>",
        "<h2>What is in it</h2>",
        _plots(metas),
        "<h2>What was rejected, and why</h2>",
        _rejects(rejects),
        "<h2>Whose music it is</h2>",
        _rightsholders(metas),
        "<h2>How it was made</h2>",
        _made(info, metas),
        "</div>",
    ]
    return "".join(parts)


# --- hours ------------------------------------------------------------------------------------------------------


def _hours(
    metas: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str | None]
) -> dict[str, dict[str, float]]:
    """Hours per value and split, the largest first; absent values count as `unknown`."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0.0))
    for m in metas:
        found[name(m) or "unknown"][m["split"]] += m["duration_seconds"] / 3600
    return dict(sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0])))


def _key(meta: dict[str, Any]) -> str | None:
    return meta["key_signature"] or _measured(meta, "key", "key_confidence", 0.7)


def _measured(meta: dict[str, Any], what: str, confidence: str, least: float) -> Any:
    found = meta["analysis"]
    return found[what] if found.get(what) and found[confidence] >= least else None


def _tempo(meta: dict[str, Any]) -> str | None:
    bpm = meta["bpm"] or _measured(meta, "tempo_bpm", "tempo_confidence", 0.3)
    return None if bpm is None else f"{int(bpm // 10) * 10}-{int(bpm // 10) * 10 + 9} bpm"


def _languages(meta: dict[str, Any]) -> str | None:
    return meta["language"] or next((d["language"] for d in meta["descriptions"]), None)


_PLOTS: tuple[tuple[str, Callable[[dict[str, Any]], str | None], bool], ...] = (
    ("Style", lambda m: m["genre"], False),
    ("Language", _languages, False),
    ("Licence", lambda m: m["rights"]["licence"], False),
    ("Region", lambda m: m["region"], False),
    ("Key", _key, False),
    ("Tempo", _tempo, True),
    ("Era", lambda m: m["era"], False),
)


def _plots(metas: Sequence[dict[str, Any]]) -> str:
    if not metas:
        return "<p>No track was admitted.</p>"
    split_hours = _hours(metas, lambda m: m["split"])
    figures = [_figure("Hours by split", {s: split_hours[s] for s in SPLITS if s in split_hours}, in_order=True)]
    for title, name, in_order in _PLOTS:
        values = _hours(metas, name)
        if in_order:
            values = dict(sorted(values.items(), key=lambda i: (i[0] == "unknown", len(i[0]), i[0])))
        figures.append(_figure(f"Hours by {title.lower()}", values, in_order=in_order))
    key = "".join(f'<i style="background:{SPLIT_COLOURS[s]}"></i>{s}' for s in SPLITS if s in split_hours)
    return f'<p class="key">Colours: {key}</p><div class="plots">{"".join(figures)}</div>'


def _figure(title: str, values: dict[str, dict[str, float]], *, in_order: bool = False) -> str:
    """Horizontal bars of hours, stacked by split; the long tail is gathered unless the order carries meaning."""
    most = 24 if in_order else 14
    shown = dict(list(values.items())[:most])
    rest = list(values.values())[most:]
    if rest:
        shown[f"{len(rest)} others"] = {s: sum(v[s] for v in rest) for s in SPLITS}
    unit, scale = ("h", 1.0) if max(sum(v.values()) for v in shown.values()) >= 1 else ("min", 60.0)
    rows = [(name, [(SPLIT_COLOURS[s], v[s] * scale) for s in SPLITS]) for name, v in shown.items()]
    return f"<figure><figcaption>{escape(title)}</figcaption>{_bars(title, rows, unit)}</figure>"


def _bars(name: str, rows: Sequence[tuple[str, list[tuple[str, float]]]], unit: str) -> str:
    """An inline SVG of stacked horizontal bars: (label, [(colour, amount)]) from top to bottom."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.parse_math": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that only the reader's browser has
        figure = Figure(figsize=(5.2, 0.55 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        longest = max((sum(a for _, a in parts) for _, parts in rows), default=1.0) or 1.0
        for at, (label, parts) in enumerate(rows):
            left = 0.0
            for colour, amount in parts:
                axes.barh(at, amount, left=left, color=colour, height=0.68)
                left += amount
            digits = 0 if unit == "" else (2 if longest < 10 else 1)
            axes.text(left + longest * 0.015, at, f"{left:.{digits}f}", va="center", color=INK, fontsize=9)
            rows_label = label if len(label) <= 30 else label[:29] + "…"
            axes.text(-longest * 0.02, at, rows_label, va="center", ha="right", color=INK)
        axes.set_xlim(0, longest * 1.14)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlabel(unit, color=INK)
        axes.tick_params(colors=INK)
        axes.xaxis.grid(True, color=GRID)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _inline(out.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An SVG file as it stands inside a page: no prologue, no metadata, no addresses, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(name)}">', svg
    )
    prefix = re.sub(r"\W+", "-", name.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)


# --- tables -----------------------------------------------------------------------------------------------------


def _rejects(rejects: Sequence[dict[str, Any]]) -> str:
    if not rejects:
        return "<p>Nothing was rejected.</p>"
    by_code = Counter(r["code"] for r in rejects).most_common()
    plot = _bars("Rejected rows by reason", [(code, [(WARM, float(n))]) for code, n in by_code], "")
    meaning = "".join(
        f"<tr><td><code>{escape(code)}</code></td><td class='n'>{n}</td><td>{escape(CODES[code])}</td></tr>"
        for code, n in by_code
    )
    shown = rejects[:500]
    rows = "".join(
        f"<tr><td class='n'>{r['row']}</td><td>{escape(r['track_id'] or '(no id)')}</td><td>{escape(r['stage'])}</td>"
        f"<td><code>{escape(r['code'])}</code></td><td>{escape(r['message'])}</td></tr>"
        for r in shown
    )
    more = f"<p>{len(rejects) - len(shown)} more stand in rejects.parquet.</p>" if len(rejects) > len(shown) else ""
    return (
        f'<div class="plots"><figure><figcaption>Rejected rows by reason</figcaption>{plot}</figure>'
        f"<table><tr><th>code</th><th class='n'>rows</th><th>meaning</th></tr>{meaning}</table></div>"
        "<p></p><div class='scroll'><table><tr><th class='n'>row</th><th>track</th><th>stage</th><th>code</th>"
        f"<th>reason</th></tr>{rows}</table></div>{more}"
    )


def _rightsholders(metas: Sequence[dict[str, Any]]) -> str:
    hours: dict[str, float] = defaultdict(float)
    tracks: Counter[str] = Counter()
    licences: dict[str, set[str]] = defaultdict(set)
    for m in metas:
        for party in {str(h["party"]) for h in m["rights"]["rightsholders"]}:
            hours[party] += m["duration_seconds"] / 3600
            tracks[party] += 1
            licences[party].add(m["rights"]["licence"])
    ordered = sorted(hours, key=lambda p: (-hours[p], p))
    rows = "".join(
        f"<tr><td>{escape(p)}</td><td class='n'>{tracks[p]}</td><td class='n'>{hours[p]:.3f}</td>"
        f"<td>{escape(', '.join(sorted(licences[p])))}</td></tr>"
        for p in ordered[:200]
    )
    share = max(hours.values()) / max(sum(hours.values()), 1e-9) if hours else 0.0
    return (
        f"<p>{len(ordered)} rightsholder(s); the largest stands for {share:.0%} of their hours.</p>"
        "<div class='scroll'><table><tr><th>rightsholder</th><th class='n'>tracks</th><th class='n'>hours</th>"
        f"<th>licences</th></tr>{rows}</table></div>"
    )


def _made(info: dict[str, Any], metas: Sequence[dict[str, Any]]) -> str:
    codec = info["codec"]
    captions = sum(len(m["captions"]) for m in metas)
    languages = sorted({d["language"] for m in metas for d in m["descriptions"]})
    measured = sum(any(s.startswith("analysis.") for c in m["captions"] for s in c["sources"]) for m in metas)
    facts = [
        ("data set version", f"<code>{info['dataset_version']}</code>"),
        ("settings", f"<code>{info['settings_hash']}</code>"),
        (
            "codec",
            f"{escape(codec['name'])} <code>{codec['identity']}</code><br>{codec['num_codebooks']} codebooks × "
            f"{codec['codebook_size']}, {codec['frame_rate']} frames/s, {codec['sample_rate_hz']} Hz",
        ),
        ("processor", escape(info["processor"])),
        ("analysis", escape(info["settings"]["analysis"])),
        ("captions", f"{captions} variants; descriptions in {escape(', '.join(languages) or 'no language')}"),
        ("measured claims", f"{measured} tracks have a caption with a measured key or tempo"),
        ("splits", "disjoint by artist and by work: rows that share either are drawn together, by a hash"),
        ("checks", f"<code>{escape(json.dumps(info['settings']['checks'], sort_keys=True))}</code>"),
    ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in facts)
    return f"<table>{rows}</table>"
