"""The HTML of the demo's report: pure functions from figures and clips to one page without any outside address.

Everything is inside the page: sound as data URIs, spectrograms as PNG, curves as SVG that takes the page's colours,
one small script. It follows the reader's light or dark setting and the width of the window, and it works from file://.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

KIND_NAMES = {
    "run": ("This run", "by the model just trained"),
    "shipped": ("Shipped model", "by the model that trained longer"),
    "codec": ("Codec ceiling", "the original, through the codec"),
    "original": ("Original", "the catalogue's own recording"),
}

STYLE = """
:root { color-scheme: light dark; --ground:#fbfaf8; --card:#fff; --ink:#1c1b19; --soft:#6b6862; --line:#e4e1da;
  --run:#2f6fb3; --shipped:#7a4fb0; --codec:#a8690a; --original:#3c7a4a; --bad:#b3372f; }
@media (prefers-color-scheme: dark) { :root { --ground:#141416; --card:#1d1d20; --ink:#eceae5; --soft:#9d9a93;
  --line:#323236; --run:#74aef0; --shipped:#bb98ee; --codec:#e0a64a; --original:#83c693; --bad:#ef8a80; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header > div, footer > div { max-width:76rem; margin:0 auto; padding:0 1.25rem; }
header { padding:3rem 0 0; } footer { padding:2rem 0 4rem; color:var(--soft); font-size:.875rem; }
h1 { font-size:clamp(1.7rem, 4vw, 2.5rem); line-height:1.15; margin:0 0 .5rem; letter-spacing:-.015em; }
h2 { font-size:1.35rem; margin:3rem 0 .5rem; letter-spacing:-.01em; }
h3 { font-size:1.1rem; font-weight:600; margin:2.25rem 0 .1rem; max-width:52rem; text-wrap:pretty; }
p { max-width:46rem; margin:.4rem 0 .9rem; } .soft, .about { color:var(--soft); }
.about { font-size:.9rem; margin-top:0; }
nav { display:flex; flex-wrap:wrap; gap:.25rem 1.25rem; padding-top:.5rem; } a { color:inherit; }
nav a { color:var(--soft); text-underline-offset:.25em; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(12.5rem, 1fr)); gap:.75rem; margin:1.5rem 0 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:.6rem; padding:.8rem 1rem; }
.tile b { display:block; font-size:1.5rem; font-weight:600; letter-spacing:-.01em; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:.85rem; line-height:1.35; display:block; }
.clips { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(100%, 16.5rem), 1fr)); gap:.9rem; }
.clip { margin:0; background:var(--card); border:1px solid var(--line); border-radius:.6rem; overflow:hidden;
  border-top:3px solid var(--tone); display:flex; flex-direction:column; }
.clip figcaption { padding:.55rem .8rem .5rem; line-height:1.3; } .clip b { color:var(--tone); }
.clip small { display:block; color:var(--soft); font-size:.8rem; }
.run { --tone:var(--run); } .shipped { --tone:var(--shipped); } .codec { --tone:var(--codec); }
.original { --tone:var(--original); }
.picture { position:relative; cursor:pointer; background:#000; line-height:0; }
.picture img { width:100%; height:8.5rem; display:block; object-fit:fill; }
.picture i { position:absolute; top:0; bottom:0; left:0; width:1px; background:#fff; opacity:.85; pointer-events:none; }
.picture span { position:absolute; left:.35rem; font:10px/1 system-ui, sans-serif; color:#fff; opacity:.85;
  text-shadow:0 0 3px #000, 0 0 2px #000;
  transform:translateY(50%); pointer-events:none; }
.clip audio { width:100%; height:2.4rem; display:block; }
.facts { padding:.45rem .8rem .6rem; color:var(--soft); font-size:.8rem; font-variant-numeric:tabular-nums; }
.plots { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap:.9rem; }
.plot { background:var(--card); border:1px solid var(--line); border-radius:.6rem;
  padding:.7rem .8rem .4rem; margin:0; }
.plot figcaption { font-weight:600; font-size:.95rem; } .plot svg { width:100%; height:auto; display:block; }
.wide { grid-column:1 / -1; }
.legend { display:flex; flex-wrap:wrap; gap:.2rem 1.4rem; font-size:.85rem; color:var(--soft); margin:.6rem 0;
  padding:0; list-style:none; }
.legend i { display:inline-block; width:1.6rem; vertical-align:middle; margin-right:.45rem; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:.3rem .9rem .3rem 0; border-bottom:1px solid var(--line); font-weight:400; }
th { color:var(--soft); } th:first-child, td:first-child { text-align:left; }
code { font:.875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap:anywhere; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:.25rem 1.25rem; max-width:56rem; font-size:.92rem; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; } .bad { color:var(--bad); }
.frame { width:100%; height:46rem; border:1px solid var(--line); border-radius:.6rem; background:var(--card); }
@media (max-width:34rem) { dl { grid-template-columns:1fr; gap:0; } dd { margin-bottom:.5rem; } }
@media print { audio, nav { display:none !important; } }
"""

SCRIPT = """
const players = [...document.querySelectorAll('audio')];
const state = document.getElementById('state');
let ready = 0, failed = 0;
const tell = () => { state.textContent = failed ? `${failed} of ${players.length} clips cannot be played here`
  : ready === players.length ? `${ready} clips ready to play` : `${ready} of ${players.length} clips loaded`;
  state.className = failed ? 'bad' : 'soft'; };
for (const player of players) {
  const picture = player.parentElement.querySelector('.picture'), line = picture.querySelector('i');
  const place = () => { line.style.left = 100 * player.currentTime / (player.duration || 1) + '%'; };
  let counted = false;
  const count = () => { if (!counted && player.duration > 0) { counted = true; ready++;
    player.dataset.seconds = player.duration.toFixed(2); tell(); } };
  player.addEventListener('loadedmetadata', count);
  player.addEventListener('error', () => { failed++; tell(); });
  player.addEventListener('timeupdate', place);
  player.addEventListener('seeked', place);
  player.addEventListener('play', () => { players.forEach(p => p !== player && p.pause());
    const step = () => { place(); if (!player.paused) requestAnimationFrame(step); }; step(); });
  picture.addEventListener('click', e => { const box = picture.getBoundingClientRect();
    player.currentTime = (e.clientX - box.left) / box.width * player.duration; player.play(); });
  if (player.readyState > 0) count();
}
tell();
"""


@dataclass(frozen=True)
class ClipView:
    """A clip ready for the page: its kind, data URIs of sound and picture, facts in a line, the WAV beside the page."""

    kind: str
    sound: str
    picture: str
    facts: str
    wav: str


@dataclass(frozen=True)
class Listening:
    """One prompt with its clips; `about` says where the prompt comes from."""

    prompt: str
    about: str
    clips: Sequence[ClipView]


@dataclass(frozen=True)
class Page:
    """All that the page shows. Texts are plain and are escaped here; `plots` (title, SVG, wide), `legend` and `card`
    are markup made by this program."""

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    frequency_ticks: Sequence[tuple[str, float]]
    listening: Sequence[Listening]
    listening_notes: Sequence[str]
    plots: Sequence[tuple[str, str, bool]]
    legend: str
    losses_head: Sequence[str]
    losses: Sequence[Sequence[str]]
    losses_notes: Sequence[str]
    card: str
    licences: Sequence[tuple[str, str]]
    marking: str
    steps: Sequence[Sequence[str]]
    footer: str


def figure(
    tone: str, name: str, about: str, picture: str, sound: str, facts: str, ticks: Sequence[tuple[str, float]]
) -> str:
    """One clip: `tone` is its class of colour, `facts` is markup, the other texts are escaped here."""
    marks = "".join(f'<span style="bottom:{100 * height:.1f}%">{escape(text)}</span>' for text, height in ticks)
    return (
        f'<figure class="clip {tone}"><figcaption><b>{escape(name)}</b><small>{escape(about)}</small></figcaption>'
        f'<div class="picture"><img src="{picture}" alt="spectrogram">{marks}<i></i></div>'
        f'<audio controls preload="metadata" src="{sound}" aria-label="{escape(name)}"></audio>'
        f'<div class="facts">{facts}</div></figure>'
    )


def _clip(clip: ClipView, ticks: Sequence[tuple[str, float]]) -> str:
    name, about = KIND_NAMES[clip.kind]
    facts = f'{escape(clip.facts)} · <a href="{escape(clip.wav)}" download>WAV</a>'
    return figure(clip.kind, name, about, clip.picture, clip.sound, facts, ticks)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def render(page: Page) -> str:
    """The page as HTML text."""
    tiles = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(text)}</span></div>' for v, text in page.tiles)
    heard = "".join(
        f"<section><h3>“{escape(item.prompt)}”</h3><p class=about>{escape(item.about)}</p>"
        f'<div class="clips">{"".join(_clip(c, page.frequency_ticks) for c in item.clips)}</div></section>'
        for item in page.listening
    )
    plots = "".join(
        f'<figure class="plot{" wide" if wide else ""}"><figcaption>{escape(title)}</figcaption>{svg}</figure>'
        for title, svg, wide in page.plots
    )

    def notes(texts: Sequence[str]) -> str:
        return "".join(f"<p class=soft>{escape(t)}</p>" for t in texts)

    licences = "".join(f"<dt>{escape(what)}</dt><dd>{escape(text)}</dd>" for what, text in page.licences)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title><style>{STYLE}</style></head><body>
<header><div><h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p>
<nav><a href="#listen">Listen</a><a href="#curves">Learning</a><a href="#data">Data</a>
<a href="#terms">Licences and marking</a><a href="#made">How it was made</a></nav>
<div class="tiles">{tiles}</div></div></header>
<main>
<h2 id="listen">Listen</h2>{notes(page.listening_notes)}<p id="state" class="soft">loading the clips</p>{heard}
<h2 id="curves">Learning</h2>{page.legend}<div class="plots">{plots}</div>
<h3>Losses in nats</h3>{table(page.losses_head, page.losses)}{notes(page.losses_notes)}
<h2 id="data">Data</h2>{page.card}
<h2 id="terms">Licences and marking</h2><dl>{licences}</dl><p>{escape(page.marking)}</p>
<h2 id="made">How it was made</h2>{table(("step", "time", "what happened"), page.steps)}
</main><footer><div>{escape(page.footer)}</div></footer><script>{SCRIPT}</script></body></html>
"""
