"""`python -m benchmarks.codec`: how fast a codec encodes beside eager `transformers`, and how far its codes agree.

Speed: the same weights and the same audio, in turn through `transformers.EncodecModel.encode` (float32, as it loads)
and through `Codec.encode_track`, which is what ingest calls; the ratio is the median over the pairs. The floor is what
the network's multiplications cost at the speed that this machine reaches in a matrix product.

Agreement: a long track in windows against the whole track at once, 30-s crops by themselves against the same frames of
the whole, and the crops in one batch against one by one. Codecs: `demo`, a folder, or a size (`32khz`) with random
weights, whose codebooks are set to the spread of its latents. Keep the machine otherwise idle.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from musicgen import codec as codecs
from musicgen import settings
from musicgen.errors import UserError

EMBEDDED = Path(__file__).resolve().parent.parent / "musicgen" / "assets" / "catalogue" / "catalog.jsonl"


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        what: speed, agreement or both.
        codecs: `demo`, codec folders, or sizes (`32khz`) with random weights.
        catalog: whose audio is encoded, tracks joined end to end.
        seconds: length of the piece of the speed comparison.
        pairs: pairs of measurements.
        threads: thread counts to measure at; ingest uses one per worker.
        track_seconds: length of the long track whose agreement is measured.
        contexts: frames of context, besides the default.
        json: also write the result to this file.
    """

    what: Literal["both", "speed", "agreement"] = "both"
    codecs: tuple[str, ...] = ("demo", "32khz")
    catalog: str = str(EMBEDDED)
    seconds: float = 30.0
    pairs: int = 5
    threads: tuple[int, ...] = (1, 2)
    track_seconds: float = 180.0
    contexts: tuple[int, ...] = (0, 100)
    json: str = ""

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.seconds <= 0 or self.track_seconds < 60:
            raise ValueError("give at least 1 pair, more than 0 seconds and a track of at least 60 seconds")


def mac_per_second(model: Any) -> float:
    """Multiply-accumulates of encoder and quantiser per second of audio, from the shapes of the weights.

    For the paper's 32 kHz model 3.94e9, that is 7.9 GFLOP.
    """
    rate, total = float(model.config.sampling_rate), 0.0

    def conv(module: torch.nn.Conv1d, rate: float) -> float:
        return module.weight.numel() * rate / module.stride[0]

    for layer in model.encoder.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Conv1d):
                total += conv(module, rate)
            if isinstance(module, torch.nn.LSTM):
                total += rate * sum(p.numel() for name, p in module.named_parameters() if "weight" in name)
        if hasattr(layer, "conv"):
            rate /= layer.conv.stride[0]
    return total + rate * sum(layer.codebook.embed.numel() for layer in model.quantizer.layers)


def network(name: str, audio: torch.Tensor) -> tuple[Any, codecs.Codec]:
    """The eager `transformers` model and our codec, of equal weights."""
    if name not in codecs.CODEC_SIZES or name == "demo":
        return codecs.load_network(name), codecs.load(name)
    model, ours = random_network(codecs.CODEC_SIZES[name], audio), codecs.build(codecs.CODEC_SIZES[name])
    ours.load_state_dict(model.state_dict())
    return model, codecs.Codec(ours, name)


@torch.no_grad()
def random_network(size: codecs.CodecConfig, audio: torch.Tensor) -> Any:
    """A network of this size with random weights, and codebooks as wide as its latents of `audio [1, C, N]`; in values
    of 16 bits, as `musicgen.codec.save` keeps them."""
    torch.manual_seed(0)
    model: Any = codecs.build(size).eval()
    spread = float(model.encoder(audio[..., : 2 * size.sample_rate_hz]).std())
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=spread)
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.half().float() if tensor.is_floating_point() else tensor)
    return model


def sound(catalog: str, seconds: float, sample_rate_hz: int) -> torch.Tensor:
    """Tracks of a catalogue joined to one piece: `[1, 1, N]` float32, mono."""
    from pipelines import audio
    from pipelines.catalog import read

    found, parts, missing = read(catalog), [], round(seconds * sample_rate_hz)
    for row in found.rows:
        try:
            decoded = audio.decode_bytes(found.folder.join(row.values["uri"]).read(), 3600.0)
        except (audio.DecodeError, OSError, KeyError, TypeError):
            continue
        part = audio.prepare(decoded.pcm, decoded.sample_rate_hz, sample_rate_hz, 1)[:, :missing]
        parts.append(part)
        missing -= part.shape[1]
        if missing <= 0:
            return torch.from_numpy(np.concatenate(parts, axis=1))[None]
    raise UserError(f"catalog {catalog!r} holds less than {seconds:g} seconds of readable audio; give another")


def matmul_gflops(repeats: int = 9) -> float:
    """Billions of multiplications and additions per second of a 1024 × 1024 float32 matrix product, best of some."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return max(2 * 1024**3 / _seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Speed:
    """Audio-seconds per second of eager `transformers` and of ours, their ratio, and what the machine could do."""

    codec: str
    threads: int
    eager: float
    ours: float
    ratio: float
    equal_codes: float
    gflops: float
    matmul_gflops: float
    floor: float


@torch.no_grad()
def speed(name: str, audio: torch.Tensor, threads: int, pairs: int) -> Speed:
    """Interleaved pairs on one piece of audio `[1, 1, N]`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, codec = network(name, audio)
        seconds, track = audio.shape[-1] / codec.sample_rate, audio[0].numpy()
        expected = model.encode(audio).audio_codes[0]
        equal = float((torch.from_numpy(codec.encode_track(track)) == expected[0]).float().mean())
        times = []
        for _ in range(pairs):
            times.append((_seconds(lambda: model.encode(audio)), _seconds(lambda: codec.encode_track(track))))
        eager, ours = (statistics.median(column) for column in zip(*times, strict=True))
        per_second, peak = 2 * mac_per_second(codec.model) / 1e9, matmul_gflops()
        return Speed(
            name, threads, seconds / eager, seconds / ours, statistics.median(a / b for a, b in times),
            equal, per_second * seconds / ours, peak, peak / per_second,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def agreement(name: str, audio: torch.Tensor, contexts: Sequence[int]) -> dict[str, float]:
    """Share of equal codes, per comparison, for one long track `[1, 1, N]`."""
    codec = network(name, audio)[1]
    whole, track = codec.encode(audio)[0].numpy(), audio[0].numpy()
    total, result = whole.shape[1], {}

    in_windows = codec.encode_track(track)
    for context in dict.fromkeys((codecs.CONTEXT_FRAMES, *contexts)):
        codes = codec.encode_track(track, context_frames=context)
        label = f"windows of {codecs.WINDOW_FRAMES} frames after {context} of context, with the whole track"
        result[label + (" (the default)" if context == codecs.CONTEXT_FRAMES else "")] = float((codes == whole).mean())
    frames = 30 * codec.frame_rate
    starts = range(0, total - frames + 1, math.ceil(frames / 2))
    crops = torch.cat([audio[..., s * codec.hop : (s + frames) * codec.hop] for s in starts])
    single = np.stack([codec.encode(crop[None])[0].numpy() for crop in crops])
    batched = codec.encode(crops).numpy()
    of_track = np.stack([in_windows[:, s : s + frames] for s in starts])
    result["30-s crops by themselves, with the same frames of the track in windows"] = float(
        (single == of_track).mean()
    )
    middle = slice(codecs.CONTEXT_FRAMES, -8)
    label = f"the same, the first {middle.start} and the last {-middle.stop} frames of a crop left out"
    result[label] = float((single[..., middle] == of_track[..., middle]).mean())
    result["30-s crops in one batch, with one by one"] = float((batched == single).mean())
    return result


def speed_table(rows: Sequence[Speed]) -> Table:
    """The comparison as a table."""
    table = Table(title="encoding, audio-seconds per second", title_justify="left")
    for column in ("codec", "threads", "eager", "ours", "ratio", "equal codes", "GFLOP/s", "matmul", "floor", "of it"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for row in rows:
        table.add_row(
            row.codec, str(row.threads), f"{row.eager:.2f}", f"{row.ours:.2f}", f"{row.ratio:.2f}",
            f"{row.equal_codes:.3%}", f"{row.gflops:.1f}", f"{row.matmul_gflops:.1f}", f"{row.floor:.1f}",
            f"{row.ours / row.floor:.0%}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str]) -> int:
    """Measure and print; see `BenchConfig`."""
    config = settings.parse(BenchConfig, argv, prog="python -m benchmarks.codec")
    console = Console(file=sys.stdout, width=120)
    result: dict[str, Any] = {"settings": settings.to_dict(config)}
    rate = codecs.CodecConfig().sample_rate_hz
    if config.what != "agreement":
        piece = sound(config.catalog, config.seconds, rate)
        rows = [speed(name, piece, n, config.pairs) for name in config.codecs for n in config.threads]
        result["speed"] = [asdict(row) for row in rows]
        console.print(speed_table(rows))
        console.print(
            f"{config.seconds:g} s, {config.pairs} pairs; floor: the matrix product's speed on the network's FLOP"
        )
    if config.what != "speed":
        track = sound(config.catalog, config.track_seconds, rate)
        result["agreement"] = {}
        for name in config.codecs:
            found = result["agreement"][name] = agreement(name, track, config.contexts)
            table = Table(title=f"equal codes, {name}, {config.track_seconds:g} s", title_justify="left")
            table.add_column("comparison")
            table.add_column("equal", justify="right")
            for label, share in found.items():
                table.add_row(label, f"{share:.3%}")
            console.print(table)
    print(json.dumps({"codec": result}))
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    settings.run(main)
