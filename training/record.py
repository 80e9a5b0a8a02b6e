"""What a run leaves to read: metrics.jsonl and audio files are the record, Weights & Biases is its mirror.

Both get the same numbers under the same names and steps. W&B is online only when a key is set and its host answers,
else offline (`wandb sync` sends the run later); a failing W&B never stops or holds training. A resumed run keeps its
W&B id, and the local record is cut back to the step it resumes from, so every curve has one value per step; what W&B
lost with a killed process is sent again. Records outlive kills and full disks: what can be read of one is kept.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import logging
import netrc
import os
import socket
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from musicgen.errors import UserError
from training import wandb_file

log = logging.getLogger(__name__)

# What a line of metrics.jsonl, and W&B, may hold beside `step`. `K` stands for a codebook from 1.
NAMES = {
    "train/loss": "cross-entropy in nats per code over the step's global batch, mean of the codebooks",
    "train/loss_qK": "the same of one codebook",
    "train/ppl_qK": "its perplexity",
    "train/lr": "learning rate of the step",
    "train/d": "step size that D-Adaptation or Prodigy has found",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/audio_seconds": "audio that the run has seen",
    "train/audio_seconds_per_second": "speed since the line before, over all ranks",
    "train/mfu": "model FLOP of a step by `budget.FLOP_RULE` over its time and the device's peak",
    "train/outside_model_share": "share of the time neither in the model nor in its optimiser (aim: under 0.03)",
    "train/memory_gib": "peak memory of rank 0: of its GPU, or of the process",
    "seconds/step": "a step, mean since the line before",
    "seconds/data": "of it waiting for the loader",
    "seconds/text": "last step: text encoder",
    "seconds/forward": "last step: model and loss",
    "seconds/backward": "last step: gradients",
    "seconds/optimizer": "last step: clipping, update, moving average",
    "seconds/communication": "last step: what shows of ranks talking, within the phases above",
    "seconds/communication_total": "last step: all of it",
    "valid/loss": "nats per code of the averaged weights on the fixed crops",
    "valid/loss_qK": "the same of one codebook",
    "valid/ppl_qK": "its perplexity",
    "valid/below_unigram": "nats below a model that only knows how common each code is",
}
STEP = "trainer/global_step"  # Lightning's name for the step in W&B
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # how long a W&B server may keep a run waiting


class MetricsFile:
    """metrics.jsonl: one JSON object per line with `step` and the metrics of one moment.

    Args:
        path: the file; made when missing.
        step: completed steps of the run; lines of later steps are cut off.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            lines, damaged = metrics_of(path) if step else ([], 0)
            if damaged:
                log.warning("%s: damaged lines are left out (%d)", path, damaged)
            kept = [line for line in lines if line["step"] <= step]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cannot_write(path, error) from error
        self._waiting = b""  # lines that a full disk did not take

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a line. Where the disk is full it waits here for the next one, and the training goes on."""
        lines = self._waiting + (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            append_whole(self.path, lines)
        except OSError as error:
            if not self._waiting:
                log.warning("%s cannot be written (%s); its lines are kept until it can", self.path, error.strerror)
            self._waiting = lines
        else:
            self._waiting = b""


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to tell of a file of a run that cannot be written."""
    return UserError(
        f"RUN: {path} cannot be written: {error.strerror or error}. Free some room or make the folder writable and run "
        "the same command again"
    )


def append_whole(path: Path, data: bytes) -> None:
    """Add bytes to a file, all or none."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read (see `lines_of`); none where there is no such file."""
    return metrics_of(path)[0] if path.is_file() else []


def metrics_of(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines with a whole number as their `step`, and how many others there are; else as `lines_of`."""
    lines, damaged = lines_of(path, "step")
    whole = [line for line in lines if type(line["step"]) is int]
    return whole, damaged + len(lines) - len(whole)


def lines_of(path: Path, key: str) -> tuple[list[dict[str, Any]], int]:
    """The objects with `key` first among a file's lines, and how many whole lines hold none.

    A line that a kill cut short has no end, so that the next one stands behind it in the same line; that one is found.
    A last line without an end is left out and not counted. No file has no lines.

    Raises:
        OSError: the file cannot be read, or something else than a file stands there.
    """
    if not path.exists():
        return [], 0
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    *whole, last = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    found = [_object(text, key) for text in whole if text.strip()]
    made = [line for line in found if line is not None]
    unended = _object(last, key)
    return [*made, *([unended] if unended is not None else [])], len(found) - len(made)


def _object(text: str, key: str) -> dict[str, Any] | None:
    for begin in (0, text.rfind(f'{{"{key}"')):
        with contextlib.suppress(ValueError, RecursionError):
            made = json.loads(text[max(begin, 0) :])
            if isinstance(made, dict) and key in made:
                return made
    return None


def _wandb_host() -> urllib.parse.SplitResult | None:
    """Where W&B's server is; None where WANDB_BASE_URL is no address."""
    try:
        host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
        (host.hostname or "").encode("idna")
        return host if host.hostname and host.port != 0 and host.scheme in ("http", "https") else None
    except ValueError:
        return None


def wandb_mode(timeout_seconds: float = 3.0) -> str:
    """`WANDB_MODE` where it is set; else `online` when there is a key and the host answers, `offline` otherwise.

    Where WANDB_BASE_URL is no address nothing can be sent, and it is `offline` with a warning.
    """
    given, host = os.environ.get("WANDB_MODE"), _wandb_host()
    if given == "disabled" or (given and host is not None):
        return given
    if host is None:
        log.warning(
            "WANDB_BASE_URL=%r is no address such as https://wandb.example.com:8080; mend it; the record is kept "
            "offline, and `wandb sync` sends it later",
            os.environ["WANDB_BASE_URL"],
        )
        return "offline"
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):
        has_key = has_key or netrc.netrc().authenticators(host.hostname or "") is not None
    if not has_key:
        return "offline"
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname or "", port), timeout=timeout_seconds).close()
    except OSError:
        return "offline"
    return "online"


def new_run_id() -> str:
    """A fresh W&B run id; it stays with the run over every resume."""
    return uuid.uuid4().hex[:12]


def wandb_logger(
    folder: Path, run_id: str, settings_tree: Mapping[str, Any], start: Mapping[str, Any] | None = None
) -> Any:
    """Lightning's WandbLogger for a run folder, or None (with a warning) when W&B cannot start.

    A server that takes the connection and then says nothing costs the time of `INIT_SECONDS`; the run is then kept
    offline, and `wandb sync` sends it later.

    Args:
        folder: the run's folder; offline files go to `folder/wandb`.
        run_id: id that is kept over resumes.
        settings_tree: the run's settings as plain dicts, shown as the run's config.
        start: what may differ between two starts of the run, shown there as well.
    """
    if importlib.util.find_spec("wandb") is None:
        log.warning("W&B is not installed; the record stands in %s alone", folder / "metrics.jsonl")
        return None
    mode = wandb_mode()
    with _without_a_bad_address():
        run = _start(folder, run_id, settings_tree, mode)
        if run is None and mode == "online":
            log.warning("the record is kept offline: `wandb sync %s` sends it later", folder / "wandb")
            _forget_runs()
            run = _start(folder, run_id, settings_tree, "offline")
    if run is None:
        return None
    from pytorch_lightning.loggers import WandbLogger

    try:
        if start:
            run.config.update(dict(start), allow_val_change=True)
        return WandbLogger(experiment=run, save_dir=str(folder))
    except Exception as error:
        log.warning("W&B failed (%s); the record stands in %s", error, folder / "metrics.jsonl")
        return None


def _forget_runs() -> None:
    """Stop W&B's helper process, which would go on holding the id of a run that could not start."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


@contextlib.contextmanager
def _without_a_bad_address() -> Iterator[None]:
    """W&B reads WANDB_BASE_URL offline as well, and does not start where it is no address."""
    bad = os.environ.pop("WANDB_BASE_URL", None) if _wandb_host() is None else None
    try:
        yield
    finally:
        if bad is not None:
            os.environ["WANDB_BASE_URL"] = bad


def _start(folder: Path, run_id: str, settings_tree: Mapping[str, Any], mode: str) -> Any:
    """A W&B run, or None with a warning."""
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "musicgen"),
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow",
            mode=cast(Any, mode),
            config=dict(settings_tree),
            settings=wandb.Settings(
                silent=True,
                console="off",
                # Offline nothing can hang but a busy machine may be slow; online a silent network must not hold us,
                # neither at the start nor at the end. What has not been sent stays on the disk.
                init_timeout=INIT_SECONDS if mode == "online" else 300,
                finish_timeout=FINISH_SECONDS if mode == "online" else 0.0,
                save_code=False,
                disable_git=True,
            ),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run
    except Exception as error:
        log.warning("W&B could not start %s (%s); the record stands in %s", mode, error, folder / "metrics.jsonl")
        return None


class Record:
    """The run's two records behind one call.

    Args:
        folder: the run's folder.
        step: completed steps.
        logger: Lightning's WandbLogger, or None.
    """

    def __init__(self, folder: Path, step: int, logger: Any) -> None:
        self.folder = folder
        self.metrics = MetricsFile(folder / "metrics.jsonl", step)
        self.logger = logger
        if step and logger is not None:
            self._catch_up()

    def _catch_up(self) -> None:
        """Mirror the kept lines that W&B lost with a killed process, or never saw."""
        with self._guard():
            has = wandb_file.last_value(self.folder, STEP)
            known = max(-1 if has is None else has, self.logger.experiment.step - 1)  # a server counts on
            for line in read_metrics(self.metrics.path):
                if line["step"] > known:
                    self._mirror(line["step"], {name: value for name, value in line.items() if name != "step"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a moment, after `step` completed steps."""
        self.metrics.append(step, metrics)
        self._mirror(step, dict(metrics))

    def clips(self, step: int, clips: list[tuple[Path, str]], name: str = "samples") -> None:
        """Clips already written to files, each with its prompt."""
        if self.logger is None:
            return
        import wandb

        with self._guard():
            audio = [wandb.Audio(str(path), caption=prompt) for path, prompt in clips]
            self._mirror(step, {name: audio})

    def _mirror(self, step: int, values: dict[str, Any]) -> None:
        if self.logger is None:
            return
        with self._guard():
            # Lightning's own log_metrics leaves the step to W&B's counter, which a resume would start anew.
            self.logger.experiment.log({**values, STEP: step}, step=step)

    @contextlib.contextmanager
    def _guard(self) -> Any:
        """Logging never stops training: a failing W&B is reported once and left out from then on."""
        try:
            yield
        except Exception as error:
            log.warning("W&B failed (%s); the record goes on in %s", error, self.metrics.path)
            self.logger = None

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run so that its file is whole."""
        if self.logger is None:
            return
        with self._guard():
            self.logger.experiment.finish(exit_code=exit_code)
