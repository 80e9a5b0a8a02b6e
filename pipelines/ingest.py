"""`python -m pipelines.ingest --catalog URI --out URI`: a licensed catalogue to shards that training reads.

catalogue -> schema -> rights gate -> what is missing -> Ray (decode … codes) -> duplicates, captions, splits -> shards.

Running it again does only what is missing: an unchanged catalogue does nothing and says so, a killed run continues,
a changed row rewrites its own bucket, a shard that is no longer what dataset.json says is made again. An output folder
made with other settings is refused, naming them. One run at a time writes a set: a second one is refused, on a local
disk at once, elsewhere before it commits.
A recording whose row is withdrawn or has an opt-out signal stays out under every row: the hashes of its file and sound
are kept in sources.parquet, from when it was in the set or from the file.
Exit code: 0 the output is usable, 1 it is not (no track, or no training track), 2 bad input.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from musicgen import settings
from musicgen.errors import UserError
from musicgen.stereo import PREFIX as STEREO
from pipelines import analysis, assemble, catalog, cluster, report, rights, shard, stages, takedown
from pipelines.assemble import AssembleConfig, Entry, Previous, SplitConfig
from pipelines.audio import DecodeConfig
from pipelines.captions import CaptionConfig
from pipelines.catalog import Row
from pipelines.checks import CODES, CheckConfig, Reject
from pipelines.cluster import RunConfig, Timing
from pipelines.rights import RightsConfig
from pipelines.stages import Job, TrackSettings
from pipelines.store import Place, alone, found

if TYPE_CHECKING:
    from musicgen.codec import Codec

DEFAULTS = Path(__file__).resolve().parent.parent / "configs" / "ingest" / "default.yaml"


@dataclass(frozen=True)
class IngestConfig:
    """Settings of ingest.

    Args:
        catalog: URI of the catalogue (.jsonl, .csv, .parquet); relative audio addresses start at its folder.
        out: URI of the data set's folder.
        codec: `demo` (embedded), a folder, a hub name, or `tiny` (small, random, for trying a catalogue out).
        channels: 1, or 2 for stereo tokens of a mono codec: left and right apart, twice the codebooks.
        chroma_variants: degraded versions of each track whose chroma is kept for the training of melody models
            (`batch.augment.variants`): equalised and noisy, see `musicgen.degrade`.
        chroma_stems: let them be other mixes of the stems as well: of those that the catalogue's column `stems` names;
            of a track without, as Demucs separates them (the extra `stems`; slow without a GPU).
        melody_stems: take the melody of every track from its stems without drums and bass, as the paper does.
        analysis: `essentia`, `builtin`, or `auto` for essentia where it is installed.
        seed: of the caption variants.
        buckets: hash buckets per split, one shard each; fixed when the set is created.
        rights: purpose, territory and day of the rights gate.
        checks: limits of the audio checks.
        captions: how captions are made.
        splits: shares of train, valid and test.
        decode: limits of the decoder.
        run: use of the machine.
    """

    catalog: str = ""
    out: str = ""
    codec: str = "demo"
    channels: int = 1
    chroma_variants: int = 0
    chroma_stems: bool = False
    melody_stems: bool = False
    analysis: str = "auto"
    seed: int = 0
    buckets: int = 16
    rights: RightsConfig = field(default_factory=RightsConfig)
    checks: CheckConfig = field(default_factory=CheckConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    splits: SplitConfig = field(default_factory=SplitConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.buckets <= 99_999:
            raise ValueError(f"buckets must lie in 1-99999, got {self.buckets}")
        if self.channels not in (1, 2):
            raise ValueError(f"channels is {self.channels}; it must be 1 (mono) or 2 (stereo)")
        if not 0 <= self.chroma_variants <= 100:
            raise ValueError(f"chroma_variants is {self.chroma_variants}; it must lie in 0-100")
        if self.chroma_stems and not self.chroma_variants:
            raise ValueError("chroma_stems says how chroma_variants are made, of which there are 0; give their number")

    @property
    def codec_name(self) -> str:
        """The codec as `stages.load_codec` takes it, `stereo:NAME` for two channels."""
        stereo = self.channels == 2 and not self.codec.startswith(STEREO)
        return f"{STEREO}{self.codec}" if stereo else self.codec


def identity(config: IngestConfig, codec: Codec) -> dict[str, Any]:
    """The settings that decide a set's bytes.

    The day of the rights decision is not among them: when a later day turns a track off, the same set shrinks.
    """
    from musicgen import codec as codecs

    return {
        "schema_version": shard.SCHEMA_VERSION,
        "codec": codec.identity,
        "codec_windows": [codecs.WINDOW_FRAMES, codecs.CONTEXT_FRAMES],
        "sample_rate_hz": codec.sample_rate,
        "channels": codec.channels,
        "analysis": analysis.backend(config.analysis),
        "seed": config.seed,
        "buckets": config.buckets,
        "purpose": sorted(config.rights.purpose),
        "territory": sorted(config.rights.territory),
        "checks": asdict(config.checks),
        "captions": asdict(config.captions),
        "splits": asdict(config.splits),
        # A set without them is what it was before they could be had.
        **({"chroma_variants": config.chroma_variants} if config.chroma_variants else {}),
        **({"chroma_stems": True} if config.chroma_stems else {}),
        **({"melody_stems": True} if config.melody_stems else {}),
    }


def settings_hash(tree: dict[str, Any]) -> str:
    """Hash of an identity."""
    return hashlib.sha256(shard.json_bytes(tree)).hexdigest()


def refuse_other_settings(root: Place, now: dict[str, Any], codec_name: str) -> None:
    """Raises `UserError` naming every setting in which an existing or unfinished set differs from this run.

    Codecs are told by name and identity: tokens of two of them in one set would mean different sounds.
    """
    for place, pick in ((root / "dataset.json", "settings"), (root / assemble.WORK / "settings.json", None)):
        if not place.is_file():
            continue
        tree = shard.read_info(root, ingested=True) if pick else _unfinished(place)
        there, here = settings.flat(tree[pick] if pick else tree), settings.flat(now)
        differ = [
            f"  - {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} now"
            for name in sorted({*there, *here})
            if name != "codec" and there.get(name) != here.get(name)
        ]
        if there.get("codec") != here["codec"]:
            name = repr(tree["codec"]["name"]) if pick else "of the unfinished run"
            differ.append(
                f"  - codec {name} (identity {str(there.get('codec'))[:12]}…) there, {codec_name!r} (identity "
                f"{here['codec'][:12]}…) now: their tokens cannot be mixed"
            )
        if differ:
            raise UserError(
                f"OUT={root} was made with other settings:\n" + "\n".join(differ) + "\n"
                "Give the same settings, or another OUT folder"
            )


def _unfinished(place: Place) -> dict[str, Any]:
    """Settings of a run that did not finish."""
    try:
        tree = json.loads(place.read())
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(
            f"{place} is damaged (it holds no JSON object). Delete {place.parent}, which holds what an unfinished run "
            "has made so far, and run the same command again"
        )
    return tree


@dataclass(frozen=True)
class Source:
    """A row whose audio is there: an admitted one, or one that was taken down."""

    row: Row
    place: Place
    work_id: str
    size: int
    stems: tuple[tuple[str, Place], ...] = ()
    taken_down: bool = False


class ResultsMissing(RuntimeError):
    """Results that the workers made are not in the work folder."""


class Ingest:
    """One run: what is admitted, what is known about it, what must be done."""

    def __init__(self, config: IngestConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.root = Place.at(config.out)
        self.work = self.root / assemble.WORK
        self.codec = stages.load_codec(config.codec_name)
        self.identity = identity(config, self.codec)
        self.hash = settings_hash(self.identity)
        self.rejects: list[tuple[Row, Reject, str | None]] = []
        self.taken_down: dict[str, tuple[Row, str]] = {}  # with the reject code
        self.stems = config.chroma_stems or config.melody_stems
        self.facts: dict[str, tuple[str, dict[str, Any]]] = {}
        self.again: set[str] = set()
        self.timing: Timing | None = None

    def _gate(self) -> list[Row]:
        """Rows that keep to the schema and whose rights allow the use."""
        today = self.config.rights.day()
        admitted = []
        for row in self.catalog.rows:
            if code := takedown.code_of(row):
                self.taken_down[str(row.track_id)] = row, code
            if row.problems:
                self.rejects.append((row, Reject("catalogue", "invalid_row", "; ".join(row.problems)), None))
                continue
            problem = rights.admit(row.rights, self.config.rights, today)
            if problem is not None:
                self.rejects.append((row, replace(problem, message=catalog.short(problem.message)), None))
            else:
                admitted.append(row)
        return admitted

    def _sources(self) -> list[Source]:
        """Admitted rows whose audio exists, the others are rejected as `missing`; then what was taken down and exists.

        Without an admitted row nothing has to be known about what was taken down.
        """
        admitted, missing = self._located(self.admitted, self.stems)
        self.rejects += [(row, Reject("source", "missing", catalog.short(why)), None) for row, why in missing]
        if not admitted:
            return []
        taken_down, _ = self._located([row for row, _ in self.taken_down.values()], False)
        return admitted + [replace(s, work_id=_digest(f"{s.work_id}\ntaken down"), taken_down=True) for s in taken_down]

    def _located(self, wanted: Sequence[Row], stems: bool) -> tuple[list[Source], list[tuple[Row, str]]]:
        """Rows whose audio (and stems) exist, and the others with what is missing."""
        rows: list[tuple[Row, list[tuple[str, Place]]]] = []  # of each its track, called "", and its stems
        sources: list[Source] = []
        missing: list[tuple[Row, str]] = []
        for row in wanted:
            addresses = {"": row.values["uri"], **(row.values["stems"] if stems else {})}
            try:
                rows.append((row, [(name, self.catalog.folder.join(uri)) for name, uri in addresses.items()]))
            except UserError as error:
                missing.append((row, str(error)))
        infos = iter(found([place for _, places in rows for _, place in places]))
        for row, places in rows:
            files: list[tuple[str, Place, Any]] = [(name, place, next(infos)) for name, place in places]
            if why := "; ".join(filter(None, (_missing(row, name, info) for name, _, info in files))):
                missing.append((row, why))
                continue
            state = f"{row.track_id}"
            for name, place, info in files:
                state += (f"\n{name}" if name else "") + f"\n{place.uri}\n{info.size}\n{info.mtime_ns}"
            work_id = _digest(f"{state}\n{self.hash}")
            sources.append(Source(row, places[0][1], work_id, files[0][2].size, tuple(places[1:])))
        return sources, missing

    def _learn(self) -> None:
        """Facts of every source that has been worked on, now or in an earlier run."""
        self._recall()
        for source in (s for s in self.sources if not s.taken_down):
            track_id = str(source.row.track_id)
            if source.work_id in self.kept:
                self.facts[track_id] = (source.work_id, stages.load(self.work, source.work_id).facts)
            elif track_id not in self.again and (found := self.previous.facts(track_id, source.work_id)) is not None:
                reject = stages.reject_of(found)
                if reject is None or reject.code not in (*self.config.run.retry, "missing"):
                    self.facts[track_id] = (source.work_id, found)

    def _recall(self) -> None:
        """Hashes of every recording that was taken down: those that an earlier run knew, and those of its file."""
        files = {str(s.row.track_id): s.work_id for s in self.sources if s.taken_down}
        for track_id in self.taken_down:
            work_id = files.get(track_id, "")
            known = takedown.sounds(self.previous.facts(track_id) or {})
            if work_id in self.kept:
                known |= takedown.sounds(stages.load(self.work, work_id).facts)
            elif work_id and not (known and self.previous.facts(track_id, work_id)):
                continue  # the file has to be read
            if known or work_id:
                self.facts[track_id] = (work_id, takedown.remembered(known))

    def decide(self) -> tuple[list[Entry], list[tuple[Row, Reject, str | None]], list[Source]]:
        """Entries of the set, all rejects, and the sources that still need work."""
        rejects = list(self.rejects)
        todo: list[Source] = []
        tracks: dict[str, Source] = {}
        for source in self.sources:
            known = self.facts.get(str(source.row.track_id))
            if known is None:
                todo.append(source)
            elif source.taken_down:
                continue
            elif (reject := stages.reject_of(known[1])) is not None:
                rejects.append((source.row, reject, known[1]["source_sha256"]))
            else:
                tracks[str(source.row.track_id)] = source
        if todo:
            return [], [], todo
        facts_of = {track_id: facts for track_id, (_, facts) in self.facts.items()}
        twins = takedown.refused({t: code for t, (_, code) in self.taken_down.items()}, facts_of, tracks)
        twins |= assemble.duplicates({t: facts_of[t] for t in tracks if t not in twins})
        groups = assemble.split_groups(self.admitted)
        plan = AssembleConfig(
            self.hash, self.config.seed, self.config.buckets, self.config.splits, self.config.captions
        )
        entries: list[Entry] = []
        for track_id, source in tracks.items():
            work_id, facts = self.facts[track_id]
            made = twins.get(track_id) or assemble.entry(source.row, work_id, facts, groups[track_id], plan)
            if isinstance(made, Reject):
                rejects.append((source.row, made, facts["source_sha256"]))
            else:
                entries.append(made)
                if work_id not in self.kept and not self.previous.has_codes(track_id, work_id):
                    todo.append(source)
        return entries, rejects, todo

    def run(self) -> int:
        """Bring the output folder up to date; returns the exit code."""
        with alone(self.root):
            refuse_other_settings(self.root, self.identity, self.codec.name)
            # The set before the catalogue: what another run makes of a newer catalogue shows as a change of the set.
            self.previous = Previous(self.root)
            try:
                return self._update()
            except (FileNotFoundError, ResultsMissing):  # another run on an object store, which has no locks
                self.previous.refuse_change()
                raise

    def _update(self) -> int:
        self.catalog = catalog.read(self.config.catalog)
        self.admitted = self._gate()
        self._compare()
        self.sources = self._sources()
        self.kept = stages.kept(self.work)
        while True:
            self._learn()
            entries, rejects, todo = self.decide()
            if todo:
                self._process(todo)
                continue
            if self._is_done(entries, rejects):
                self.work.delete()
                total = self.previous.info["counts"]
                self.console.print(
                    f"[bold]nothing to do[/]: {escape(str(self.root))} holds all {total['tracks']} tracks "
                    f"({total['hours']:.2f} h) of the catalogue; {total['rejects']} rows are rejected"
                )
                return _exit_code(self.previous.info["counts"])
            try:
                return self._commit(entries, rejects)
            except assemble.CodesMissing as error:
                self.again |= set(error.track_ids)
                for track_id in error.track_ids:
                    del self.facts[track_id]

    def _is_done(self, entries: list[Entry], rejects: list[tuple[Row, Reject, str | None]]) -> bool:
        by_shard: dict[str, list[Entry]] = {}
        for e in entries:
            by_shard.setdefault(e.shard, []).append(e)
        return (
            self.previous.whole
            and set(by_shard) == set(self.previous.shards)
            and all(self.previous.unchanged(name, members) for name, members in by_shard.items())
            and assemble.reject_rows(rejects) == self.previous.rejects
            and assemble.source_rows(entries, self.facts) == list(self.previous.sources.values())
        )

    def _compare(self) -> None:
        """Find out which shards were damaged since they were made."""
        if not self.previous.info:
            return
        with _progress(self.console) as bar:
            task = bar.add_task("comparing shards", total=len(self.previous.shards), rate="")
            self.previous.compare(lambda: bar.update(task, advance=1))
        if self.previous.altered:
            names = ", ".join(sorted(self.previous.altered))
            self.console.print(f"not what {escape(str(self.root / 'dataset.json'))} says, made anew: {names}")

    def _begin_work(self) -> None:
        """The work folder, by which the next run knows what is there as that of an unfinished one."""
        self.work.make_folder()
        (self.work / "settings.json").write(json.dumps(self.identity, indent=1).encode())

    def _process(self, todo: Sequence[Source]) -> None:
        without = [str(source.row.track_id) for source in todo if not (source.stems or source.taken_down)]
        if self.stems and without:
            try:
                stages.separator("melody_stems" if self.config.melody_stems else "chroma_stems")
            except UserError as error:
                named = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
                raise UserError(f"{error}. The catalogue names no stems (column 'stems') of {named}") from error
        self._begin_work()
        largest_first = sorted(todo, key=lambda s: (-s.size, s.work_id))
        jobs = [Job(str(s.row.track_id), s.place, s.work_id, s.size, s.stems, s.taken_down) for s in largest_first]
        what = TrackSettings(
            self.config.checks,
            self.config.decode,
            self.identity["analysis"],
            self.config.codec_name,
            self.codec.identity,
            self.codec.sample_rate,
            self.codec.channels,
            self.config.chroma_variants,
            self.config.chroma_stems,
            self.config.melody_stems,
        )
        with _progress(self.console) as bar:
            task = bar.add_task("starting Ray", total=len(jobs), rate="")
            began, heard = time.monotonic(), 0.0

            def done(tracks: int, seconds: float) -> None:
                nonlocal heard
                heard += seconds
                rate = heard / max(time.monotonic() - began, 1e-6)
                bar.update(task, advance=tracks, description="tracks", rate=f"{rate:.0f} audio-s/s")

            timing = cluster.process(jobs, what, self.work, self.config.run, done)
        if self.timing is None:
            self.timing = timing
        else:
            self.timing.completions += timing.completions
        kept = stages.kept(self.work)
        lost = [job.track_id for job in jobs if job.work_id not in kept]
        if lost:
            raise ResultsMissing(f"{len(lost)} tracks were given to Ray and have no result: {', '.join(lost[:5])}")
        self.kept = kept

    def _commit(self, entries: list[Entry], rejects: list[tuple[Row, Reject, str | None]]) -> int:
        self._begin_work()
        with _progress(self.console) as bar:
            task = bar.add_task("shards", total=len({e.shard for e in entries}), rate="")
            rows, hashes, written = assemble.write_shards(
                self.root, entries, self.previous, self.kept, lambda: bar.update(task, advance=1)
            )
            bar.update(task, completed=len({e.shard for e in entries}))
        index = shard.index_table(rows)
        rejected = assemble.reject_rows(rejects)
        total = assemble.counts(len(self.catalog.rows), index, rejected)
        info = {
            "schema_version": shard.SCHEMA_VERSION,
            "dataset_version": shard.dataset_version(index),
            "codec": {
                "name": self.codec.name,
                "identity": self.codec.identity,
                "frame_rate": self.codec.frame_rate,
                "num_codebooks": self.codec.num_codebooks,
                "codebook_size": self.codec.codebook_size,
                "sample_rate_hz": self.codec.sample_rate,
                "channels": self.codec.channels,
            },
            "settings": self.identity,
            "settings_hash": self.hash,
            "rights_day": self.config.rights.day().isoformat(),
            "rights_until": assemble.first_end(entries),
            "catalogue": self.config.catalog,
            "processor": processor(),
            "counts": total,
            "shards": hashes,
        }
        tables = (index, rejected, assemble.source_rows(entries, self.facts))
        info |= assemble.write_tables(self.root, *tables)
        metas = {e.track_id: e.meta for e in entries}
        report.write(self.root, info, [metas[t] for t in index.column("track_id").to_pylist()], rejected)
        (self.root / "dataset.json").write(json.dumps(info, indent=1, sort_keys=True, ensure_ascii=False).encode())
        self.work.delete()
        self._summary(info, len(written))
        return _exit_code(total)

    def _summary(self, info: dict[str, Any], written: int) -> None:
        total, console = info["counts"], self.console
        table = Table(title=f"data set {info['dataset_version'][:12]}", title_justify="left", show_header=False)
        table.add_row("rows in the catalogue", str(total["rows"]))
        table.add_row("tracks in shards", f"{total['tracks']}  ({total['hours']:.2f} h)")
        for split in shard.SPLITS:
            table.add_row(f"  {split}", f"{total['tracks_by_split'][split]}  ({total['hours_by_split'][split]:.2f} h)")
        table.add_row("rejected", str(total["rejects"]))
        for code, count in total["rejects_by_code"].items():
            table.add_row(f"  {code}", f"{count}  ({CODES[code]})")
        table.add_row("shards written", f"{written} of {len(info['shards'])}")
        if self.timing is not None:
            table.add_row("steady state", f"{self.timing.steady_rate():.1f} audio-seconds per second")
            table.add_row("starting Ray and its workers", f"{self.timing.start_seconds:.1f} s")
        table.add_row("data card", escape(str(self.root / "card" / "index.html")))
        console.print(table)
        if unknown := sorted(self.taken_down.keys() - self.facts.keys()):
            console.print(
                f"[bold]note[/]: the sound of {escape(', '.join(unknown[:5]))}"
                + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
                + " is not known (its file is gone and was never read here): it was taken down, but the same recording "
                "in another row would not be recognised"
            )
        if not total["tracks_by_split"]["train"]:
            console.print("[bold red]not usable for training[/]: no track is in the train split; see the rejects above")
        elif not total["tracks_by_split"]["valid"]:
            console.print("note: no track fell into the valid split; a larger splits.valid or more artists change that")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _missing(row: Row, name: str, info: Any) -> str:
    """Why a track, or the stem of that name, is no file; empty when it is one."""
    if not isinstance(info, str) and info.type == pafs.FileType.File:
        return ""
    uri = row.values["stems"][name] if name else row.values["uri"]
    what = f"no file at {uri[:300]!r}" + (f": {info}" if isinstance(info, str) else "")
    return f"stem {name!r}: {what}" if name else what


def _exit_code(total: dict[str, Any]) -> int:
    return 0 if total["tracks_by_split"]["train"] else 1


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[rate]}"), console=console)


def processor() -> str:
    """The kind of processor, with what decides its arithmetic: another kind may differ in a few codes."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return f"{name}; {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}"


def check(config: IngestConfig) -> None:
    """Settings that cannot be judged one by one. Raises `UserError`."""
    for name, value in (("catalog", config.catalog), ("out", config.out)):
        if not value.strip():
            raise UserError(f"{name} is missing: make ingest CATALOG=… OUT=… (or --{name} URI)")
    try:
        config.rights.day()
    except ValueError:
        raise UserError(f"rights.today is {config.rights.today!r}; expected YYYY-MM-DD or nothing") from None
    unknown = sorted(set(config.run.retry) - set(CODES))
    if unknown:
        raise UserError(f"run.retry names unknown reject codes: {', '.join(unknown)}; known: {', '.join(CODES)}")


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    layers = [DEFAULTS] if DEFAULTS.is_file() else []
    config = settings.parse(IngestConfig, argv, layers=layers, prog="python -m pipelines.ingest")
    check(config)
    console = Console(file=sys.stdout)
    return Ingest(config, console).run()


if __name__ == "__main__":
    settings.run(main)
