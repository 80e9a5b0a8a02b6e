"""`python -m benchmarks.ingest`: what a second of audio costs in each stage, and how near the pipeline comes to that.

Each stage runs bare in this process on one thread: core-seconds per audio-second of decode, checks, resample, chroma,
analysis, codec and writing. Then the same tracks go through Ray; in steady state the pipeline should reach at least
0.85 of cores ÷ the sum of the stages. Ray's start stands apart. Prints a table and one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from musicgen import settings
from musicgen.errors import UserError
from pipelines import analysis, assemble, audio, catalog, checks, cluster, shard, stages
from pipelines.cluster import RunConfig
from pipelines.store import Place

T = TypeVar("T")
EMBEDDED = Path(__file__).resolve().parent.parent / "musicgen" / "assets" / "catalogue" / "catalog.jsonl"
STAGES = ("decode", "checks", "resample", "chroma", "analysis", "codec", "writing")


@dataclass(frozen=True)
class BenchConfig:
    """Settings of the ingest benchmark.

    Args:
        catalog: whose audio is used; the embedded demo catalogue by default.
        codec: name of the codec.
        analysis: `auto`, `essentia` or `builtin`.
        bare_tracks: tracks measured stage by stage.
        pipeline_seconds: audio-seconds sent through Ray; tracks are used again until there are enough.
        run: use of the machine.
    """

    catalog: str = str(EMBEDDED)
    codec: str = "demo"
    analysis: str = "auto"
    bare_tracks: int = 12
    pipeline_seconds: float = 2400.0
    run: RunConfig = field(default_factory=RunConfig)


class Clock:
    """Core-seconds per stage of this process."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` and add its core-seconds to `stage`."""
        began = time.process_time()
        result = work()
        self.spent[stage] += time.process_time() - began
        return result


def bare(sources: Sequence[Place], codec: Any, chosen: str, folder: Path) -> tuple[Clock, float]:
    """Every stage for every source in this process; returns the clock and the audio-seconds."""
    from musicgen.chroma import chroma_bins

    clock, seconds = Clock(), 0.0
    limits = checks.CheckConfig()
    work, records = Place.at(folder / "work"), []
    for at, source in enumerate([sources[0], *sources]):  # the first one twice: its first pass only warms up
        data = source.read()
        decoded = clock.measure("decode", lambda data=data: _decode(data, limits))
        clock.measure("checks", lambda d=decoded: checks.first(d.pcm, d.sample_rate_hz, limits))
        sound = clock.measure(
            "resample", lambda d=decoded: audio.prepare(d.pcm, d.sample_rate_hz, codec.sample_rate, codec.channels)
        )
        chroma = clock.measure("chroma", lambda s=sound: chroma_bins(s[0], codec.sample_rate))
        found = clock.measure("analysis", lambda s=sound: analysis.analyse(s[0], codec.sample_rate, chosen))
        codes = clock.measure("codec", lambda s=sound: codec.encode_track(s))
        meta = {"key": f"{at:032x}", "analysis": found}
        result = stages.Result(meta, codes, chroma)
        clock.measure("writing", lambda m=meta, r=result: stages.save(work, m["key"], r))
        records.append(clock.measure("writing", lambda c=codes, h=chroma, m=meta: shard.make_record(c, h, m)))
        if at == 0:
            clock, records = Clock(), []
        else:
            seconds += decoded.seconds
    clock.measure("writing", lambda: shard.write_tar(str(folder / "bench.tar"), records))
    return clock, seconds


def _decode(data: bytes, limits: checks.CheckConfig) -> audio.Decoded:
    """What the decoding child does, and the hash of its sound."""
    decoded = audio.decode_bytes(data, limits.max_seconds)
    audio.verify(decoded, limits)
    audio.pcm_sha256(decoded)
    return decoded


def pipeline(
    sources: Sequence[Place], mean_seconds: float, codec: Any, chosen: str, config: BenchConfig, folder: Path
) -> cluster.Timing:
    """The same sources through Ray, again and again until there is enough audio for a steady state."""
    count = max(len(sources), int(config.pipeline_seconds / mean_seconds))
    jobs = [stages.Job(f"{i}", sources[i % len(sources)], f"{i:08d}") for i in range(count)]
    what = stages.TrackSettings(
        checks.CheckConfig(),
        audio.DecodeConfig(),
        chosen,
        config.codec,
        codec.identity,
        codec.sample_rate,
        codec.channels,
    )
    return cluster.process(jobs, what, Place.at(folder / assemble.WORK), config.run)


def good_sources(config: BenchConfig) -> list[Place]:
    """Sources of the catalogue that decode; the others would only measure how fast a reject is."""
    found = catalog.read(config.catalog)
    limits = checks.CheckConfig()
    places = []
    for row in found.rows:
        if row.problems:
            continue
        place = found.folder.join(row.values["uri"])
        try:
            decoded = audio.decode_bytes(place.read(), limits.max_seconds)
            audio.verify(decoded, limits)
        except (audio.DecodeError, OSError):
            continue
        if checks.first(decoded.pcm, decoded.sample_rate_hz, limits) is None:
            places.append(place)
    if not places:
        raise UserError(f"CATALOG={config.catalog!r} holds no track that can be measured")
    return places


def main(argv: Sequence[str]) -> int:
    """The command."""
    import torch

    config = settings.parse(BenchConfig, argv, prog="python -m benchmarks.ingest")
    console = Console(file=sys.stdout)
    torch.set_num_threads(1)
    codec, chosen = stages.load_codec(config.codec), analysis.backend(config.analysis)
    sources = good_sources(config)
    step = max(1, len(sources) // config.bare_tracks)
    with tempfile.TemporaryDirectory() as scratch:
        clock, seconds = bare(sources[::step][: config.bare_tracks], codec, chosen, Path(scratch))
        timing = pipeline(
            sources, seconds / min(config.bare_tracks, len(sources)), codec, chosen, config, Path(scratch)
        )
    cores = config.run.cores or cluster.available_cores()
    per_second = {stage: clock.spent[stage] / seconds for stage in STAGES}
    total = sum(per_second.values())
    ideal, steady = cores / total, timing.steady_rate()
    table = Table(title=f"ingest, {config.codec} codec, {chosen} analysis, {cores} cores", title_justify="left")
    table.add_column("stage")
    table.add_column("core-s per audio-s", justify="right")
    table.add_column("audio-s per core-s", justify="right")
    for stage in STAGES:
        table.add_row(stage, f"{per_second[stage]:.5f}", f"{1 / max(per_second[stage], 1e-9):.0f}")
    table.add_row("sum", f"{total:.5f}", f"{1 / total:.1f}", style="bold")
    console.print(table)
    console.print(f"cores ÷ sum: {ideal:.1f} audio-seconds per second")
    console.print(f"pipeline in steady state: {steady:.1f} audio-seconds per second = {steady / ideal:.2f} of that")
    console.print(f"starting Ray and its workers: {timing.start_seconds:.1f} s, apart from the above")
    result = {
        "core_seconds_per_audio_second": {**per_second, "sum": total},
        "cores": cores,
        "ideal_audio_seconds_per_second": ideal,
        "steady_audio_seconds_per_second": steady,
        "ratio": steady / ideal,
        "ray_start_seconds": timing.start_seconds,
        "tracks": len(timing.completions),
    }
    print(json.dumps({"ingest": result}))
    cluster.stop()
    return 0


if __name__ == "__main__":
    settings.run(main)
