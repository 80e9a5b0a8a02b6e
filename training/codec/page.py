"""The page of `make codec-eval`: held-out tracks as the original, the codec and Opus, to see and to hear side by side.

One file without any outside address, in the style of the demo's report (`training.page`): sound as MP3 data URIs,
spectrograms as PNG, the tables of the evaluation. MP3 at 160 kbit/s stands far above what is compared.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen import codec as codecs
from musicgen.metrics.audio import SAMPLE_RATE_HZ
from training.codec import data
from training.page import SCRIPT, STYLE, figure, table
from training.report import HIGHEST_HZ, LOWEST_HZ, TICKS, data_uri, mp3, spectrogram_png

if TYPE_CHECKING:
    from training.codec.evaluate import CodecEvalConfig

TONES = ("codec", "run", "shipped")


def build(config: CodecEvalConfig, codec: codecs.Codec, valid: data.Pcm, report: dict[str, Any], target: Path) -> Path:
    """Write the page; returns `target`."""
    from training.codec.evaluate import rows

    head, lines = rows(report["systems"])
    books = [
        [f"codebook {level}", f"{share:.1%}", f"{ppl:.0f} of {codec.codebook_size}", f"{math.log2(ppl):.2f}"]
        for level, (share, ppl) in enumerate(zip(report["used"], report["perplexity"], strict=True), 1)
    ]
    count = min(config.clips, len(valid.track_ids))
    chosen = [round(i * (len(valid.track_ids) - 1) / max(1, count - 1)) for i in range(count)]
    heard = "".join(_track(config, codec, valid, number) for number in chosen)
    title = f"The codec {codec.name} beside Opus"
    rate = report["systems"][codec.name]["bits_per_second"] / 1000
    lead = f"{len(valid.track_ids)} held-out tracks through the codec at {rate:.2f} kbit/s and through Opus."
    about = (
        "Log-mel and mel (multi-scale) are distances, lower is better; SI-SDR and chroma (agreement of pitch classes) "
        "are better higher. Stereo is mixed to mono before it is measured. SI-SDR compares waveforms, which a "
        "codec of few bits does not keep; the ear goes by the spectra. Opus works at a variable rate: its bits are "
        "those of its packets."
    )
    described = [f"{report['hours']:.2f} hours of the whole catalogue"]
    described.append(f"{report['entropy_bits_per_second']:.0f} bits per second by how common the codes are")
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<header><div><h1>{escape(title)}</h1><p>{escape(lead)}</p>
<nav><a href="#figures">Figures</a><a href="#listen">Listen</a><a href="#books">Codebooks</a></nav></div></header>
<main><h2 id="figures">Figures</h2>{table(head, lines)}<p class="soft">{escape(about)}</p>
<h2 id="listen">Listen</h2><p id="state" class="soft">loading the clips</p>{heard}
<h2 id="books">Codebooks</h2>{table(["", "entries in use", "perplexity", "bits"], books)}
<p class="soft">{escape(" · ".join(described))}</p>
</main><footer><div>{escape(f"codec identity {codec.identity} · data {config.data}")}</div></footer>
<script>{SCRIPT}</script></body></html>
"""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".partial")
    scratch.write_text(content, encoding="utf-8")
    scratch.replace(target)
    return target


def _track(config: CodecEvalConfig, codec: codecs.Codec, valid: data.Pcm, number: int) -> str:
    """The middle of one track, each version of it: markup."""
    from training.codec.evaluate import coded_versions, compare

    whole = valid.track(number)
    length = min(whole.shape[1], int(config.clip_seconds * codec.sample_rate))
    start = (whole.shape[1] - length) // 2
    versions = coded_versions(codec, whole[:, start : start + length], config.opus)
    original = versions["original"][0]
    ticks = [(text, math.log(hz / LOWEST_HZ) / math.log(HIGHEST_HZ / LOWEST_HZ)) for hz, text in TICKS]
    figures = []
    for place, (name, (sound, rate)) in enumerate(versions.items()):
        facts, about = "PCM of 16 bits", "what went in"
        if name != "original":
            found = compare(original, sound)
            facts = (
                f"log-mel {found['log_mel']:.2f} · SI-SDR {found['si_sdr']:.1f} dB · same pitch {found['chroma']:.0%}"
            )
            about = f"{rate / 1000:.2f} kbit/s"
        tone = "original" if name == "original" else TONES[(place - 1) % len(TONES)]
        picture = data_uri("image/png", spectrogram_png(sound[None], SAMPLE_RATE_HZ))
        clip = data_uri("audio/mpeg", mp3(sound[None], SAMPLE_RATE_HZ, 160))
        label = f"Codec {name}" if name == codec.name else name[0].upper() + name[1:]
        figures.append(figure(tone, label, about, picture, clip, escape(facts), ticks))
    heading = (
        f"{valid.track_ids[number]}, {start / codec.sample_rate:.0f} s to {(start + length) / codec.sample_rate:.0f} s"
    )
    return f'<section><h3>{escape(heading)}</h3><div class="clips">{"".join(figures)}</div></section>'
