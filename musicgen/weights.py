"""The release folder: `config.json` + `model.safetensors`, the form in which the program writes and reads models.

`save_release` writes a language model with all a stranger needs to use it: its shape, the identity of the codec and
of the text encoder it was trained with, and what it was trained on. `load_release` reads it back without unpickling
anything, upcasts to float32 and refuses, in words, what is not whole or not ours. The text encoder and the codec are
named by identity and inside only where they came with an imported model; `check_codec` refuses another codec, whose
codes would mean other sounds. Licences that a model inherits are printed when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from musicgen import config, files, settings, stereo
from musicgen.errors import UserError

FORMAT = "musicgen-release"
ADAPTER = "musicgen-adapter"  # what it learned on top of another model: see musicgen.adapters
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DEMO = Path(__file__).parent / "assets" / "model"


def save_release(
    folder: str | os.PathLike[str],
    lm: torch.nn.Module,
    info: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    folders: Mapping[str, Path] | None = None,
) -> Path:
    """Write `lm` (a `MusicLM`) and `info` as a release folder, whole or absent; an older one there is replaced.

    Args:
        folder: local folder to make.
        lm: the model; `lm.config` is its `LMConfig`. Its state is stored without text encoder and codec.
        info: `codec` and `text_encoder` ({name, identity}), `training` ({step, audio_seconds_seen, data_version,
            valid_loss, crop_seconds}), `licence`, `made_by`; `inherited` ([{model, licence}]) where the weights derive
            from others.
        dtype: float32 or float16, of the stored weights; loading always upcasts to float32.
        folders: to copy into the release by name: a codec or text encoder that travels with the model, which `info`
            then names as its `folder`.
    """
    from safetensors.torch import save

    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"a release is stored as float32 or float16, not {dtype}")
    for required in ("codec", "text_encoder", "training"):
        if required not in info:
            raise ValueError(f"info lacks {required!r}; a release names its codec, text encoder and training")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in lm.state_dict().items()}
    weights = save(state, metadata={"format": FORMAT})
    document = {
        "format": FORMAT,
        "schema_version": config.SCHEMA_VERSION,
        "lm": settings.to_dict(lm.config),
        **{k: v for k, v in info.items() if k not in ("format", "schema_version", "lm", "weights")},
        "weights": {
            "file": WEIGHTS,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(t.numel() for t in state.values()),
        },
    }
    return write_folder(folder, document, {WEIGHTS: weights}, folders)


def write_folder(
    folder: str | os.PathLike[str],
    document: dict[str, Any],
    contents: Mapping[str, bytes],
    folders: Mapping[str, Path] | None = None,
) -> Path:
    """Write config.json (`document`), files and copies of folders as one folder, whole or absent; an old one goes.

    Raises:
        UserError: not a local folder, something else than a release, an adapter or a codec stands there, or it cannot
            be written.
    """
    target = files.local_path(folder)
    if target is None:
        raise UserError(f"a release is written to a local folder, not {os.fspath(folder)!r}; copy it from there")
    _check_replaceable(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    aside = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        for name, raw in contents.items():
            (temporary / name).write_bytes(raw)
        for name, source in (folders or {}).items():
            shutil.copytree(source, temporary / name)
        (temporary / CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if target.exists():  # a folder cannot be renamed onto a full one
            os.rename(target, aside)
        os.rename(temporary, target)
    except OSError as error:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise UserError(f"cannot write the release {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
    return target


_REMAINS = {WEIGHTS, "adapter_model.safetensors", "adapter_config.json"}  # of a release that lost its config.json


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what is neither an empty folder nor a release, an adapter, a codec, or what is left of one."""
    try:
        if not target.exists() or (target.is_dir() and {path.name for path in target.iterdir()} <= _REMAINS):
            return
        about = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        about = None
    kind = about.get("format", about.get("model_type")) if isinstance(about, dict) else None
    if kind not in (FORMAT, ADAPTER, "encodec"):
        raise UserError(
            f"{target} holds something else than a release, which would be lost; give a new or empty folder, or move "
            "away what stands there"
        )


def resolve(model: str | os.PathLike[str]) -> str:
    """The folder or URI behind `MODEL`.

    `demo` is the model that ships with the program; a transformers folder, audiocraft's files or a hub name are
    imported once (`musicgen.interop.sources`); all else is a place.

    Raises:
        UserError: a hub name that cannot be fetched, or a model that cannot be imported.
    """
    from musicgen.interop import sources

    return str(DEMO) if os.fspath(model) == "demo" else sources.as_release(os.fspath(model))


def place_of(model: str | os.PathLike[str], info: dict[str, Any], part: str, base: str = "") -> str:
    """Where the `codec` or `text_encoder` of a release is loaded from: its own copy when it has one, else its name.

    An adapter's are those of its base (`base` as in `load_release`).
    """
    named = info[part]
    if info["format"] == ADAPTER:
        from musicgen import adapters

        under = adapters.find_base(model, info, base)
        return place_of(under, read_info(under), part)
    place = files.local_path(files.join(resolve(model), named["folder"])) if named.get("folder") else None
    if place is None or not place.is_dir():
        return str(named["name"])
    return f"{'stereo:' if str(named['name']).startswith('stereo:') else ''}{place}"


def _missing(model: str, folder: str, name: str) -> UserError:
    if model == "demo":
        return UserError(
            f"MODEL='demo': the demo model is not in {folder}; build it with `make assets`, "
            "or give the release folder of a run (runs/<name>/release)"
        )
    if not files.exists(folder):
        return UserError(
            f"MODEL={model!r} does not exist; give 'demo' or the release folder of a run (runs/<name>/release)"
        )
    inner = files.join(folder, "release")
    hint = f"; did you mean {inner!r}?" if files.exists(inner) else ""
    return UserError(
        f"MODEL={model!r} is not a release folder: {name} is missing in it{hint or ' (a release holds '}"
        f"{'' if hint else f'{CONFIG} and {WEIGHTS}, as training writes to runs/<name>/release)'}"
    )


def read_info(model: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` of a release, checked to be one of ours; the weights are not touched.

    Raises:
        UserError: missing, not JSON, another format, or a schema newer than this program.
    """
    name, folder = os.fspath(model), resolve(model)
    try:
        raw = files.read_bytes(files.join(folder, CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(name, folder, CONFIG) from None
    except OSError as error:
        raise UserError(f"MODEL={name!r}: {CONFIG} cannot be read: {error.strerror or error}") from None
    try:
        info = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"MODEL={name!r}: {CONFIG} is not JSON ({error}); write the release again") from None
    if not isinstance(info, dict) or info.get("format") not in (FORMAT, ADAPTER):
        kind = info.get("model_type") or info.get("format") if isinstance(info, dict) else None
        raise UserError(
            f"MODEL={name!r} is not a release of this program: {CONFIG} says {kind!r} instead of format {FORMAT!r}; "
            "give 'demo', the release folder of a run (runs/<name>/release), or a hub name such as "
            "facebook/musicgen-small"
        )
    if info.get("schema_version") != config.SCHEMA_VERSION:
        raise UserError(
            f"MODEL={name!r} has release schema {info.get('schema_version')!r}, this program reads "
            f"{config.SCHEMA_VERSION}; use the program version that wrote it ({info.get('made_by', 'not recorded')})"
        )
    _check_parts(name, info)
    return info


def _check_parts(name: str, info: dict[str, Any]) -> None:
    """Raises `UserError` where what every reader of a release takes for granted is missing or of another kind."""
    problems = []
    for part in ("codec", "text_encoder"):
        about = info.get(part)
        if not isinstance(about, dict) or not all(isinstance(about.get(k), str) for k in ("name", "identity")):
            problems.append(f"{part} must have a name and an identity")
        elif about.get("folder") not in (None, part):  # it is read from there, and written there by a merge
            problems.append(f"{part} may lie in the folder {part!r} alone")
    training, inherits = info.get("training", {}), info.get("inherited", [])
    seconds: Any = training.get("crop_seconds") if isinstance(training, dict) else "?"
    if not (seconds is None or (type(seconds) in (int, float) and 0 < seconds < math.inf)):
        problems.append("training must be a mapping, its crop_seconds a length")
    if not isinstance(info.get("weights", {}), dict):
        problems.append("weights must be a mapping")
    if not (
        isinstance(inherits, list) and all(isinstance(i, dict) and {"model", "licence"} <= i.keys() for i in inherits)
    ):
        problems.append("inherited must list a model and a licence each")
    if problems:
        raise UserError(f"MODEL={name!r}: {CONFIG} is damaged: {'; '.join(problems)}; copy or write the release again")


def load_release(folder: str | os.PathLike[str], base: str = "", *, quiet: bool = False) -> tuple[Any, dict[str, Any]]:
    """A `MusicLM` (float32, eval mode, CPU) and the release's `config.json`.

    Args:
        folder: `demo`, a release folder, or its URI; an adapter comes merged into the model it was made for.
        base: the folder of that model, where it stands elsewhere than in training.
        quiet: do not print the licences that the model inherits.

    Raises:
        UserError: not a release, weights missing, cut short, altered, or of another shape than the settings say; an
            adapter whose base is not here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from musicgen.lm import MusicLM

    name, place = os.fspath(folder), resolve(folder)
    info = read_info(folder)
    if base and info["format"] != ADAPTER:
        raise UserError(f"BASE={base!r} is for adapters; MODEL={name!r} is a whole model. Leave BASE out")
    if info["format"] == ADAPTER:
        from musicgen import adapters

        lm = adapters.load(folder, info, base)
        if not quiet and (text := notice(info)):
            print(text, file=sys.stderr)
        return lm, info
    try:
        raw = files.read_bytes(files.join(place, WEIGHTS))
    except FileNotFoundError:
        raise _missing(name, place, WEIGHTS) from None
    except OSError as error:
        raise UserError(f"MODEL={name!r}: {WEIGHTS} cannot be read: {error.strerror or error}") from None
    recorded = info.get("weights", {}).get("sha256")
    if hashlib.sha256(raw).hexdigest() != recorded:
        raise UserError(
            f"MODEL={name!r}: {WEIGHTS} is not the file that {CONFIG} describes (its sha256 differs: cut short, "
            "damaged or exchanged); copy or write the release again"
        )
    try:
        state = load(raw)
    except SafetensorError as error:
        raise UserError(f"MODEL={name!r}: {WEIGHTS} is not a safetensors file ({error})") from None
    try:
        lm_config = settings.from_dict(config.LMConfig, info["lm"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"MODEL={name!r}: the model settings in {CONFIG} cannot be read: {error}") from None
    held = sum(tensor.numel() for tensor in state.values())
    if held != lm_config.num_parameters():  # before a model of any size is built
        raise UserError(
            f"MODEL={name!r}: {WEIGHTS} does not fit the settings in {CONFIG}: it holds {held:,} numbers, they ask for "
            f"{lm_config.num_parameters():,}"
        )
    with torch.random.fork_rng(devices=[]):  # the initialisation is overwritten; the caller's randomness is not spent
        lm = MusicLM(lm_config)
    try:
        lm.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    except RuntimeError as error:
        raise UserError(f"MODEL={name!r}: {WEIGHTS} does not fit the settings in {CONFIG}: {error}") from None
    if not quiet and (text := notice(info)):
        print(text, file=sys.stderr)
    return lm.eval().requires_grad_(False), info


def check_codec(info: dict[str, Any], codec: Any) -> None:
    """Refuse a codec other than the one the release was trained with.

    Raises:
        UserError: the identities differ; both are named.
    """
    trained = info.get("codec", {})
    if trained.get("identity") != codec.identity:
        raise UserError(
            f"this model was trained on tokens of codec {trained.get('name')!r} "
            f"(identity {str(trained.get('identity'))[:12]}…), but codec {codec.name!r} "
            f"(identity {codec.identity[:12]}…) was given; its codes mean other sounds. "
            "Use the codec the model names, or train a model on this one"
        )


def ancestor(model: str, licence: str | None, training: dict[str, Any]) -> dict[str, Any]:
    """A model as those that are made of it name it: with the version and the licences of the data it learned from."""
    known = {name: training[name] for name in ("data_version", "data_licences") if training.get(name)}
    return {"model": model, "licence": licence, **known}


def inherited(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a model trained from `source` inherits: `{model, licence}` of it and of what it was trained from itself, and
    the `data_version` that each has learned from, where that is known."""
    info = read_info(source)
    own = ancestor(os.fspath(source), info.get("licence"), info.get("training", {}))
    return [*([] if "imported_from" in info else [own]), *info.get("inherited", [])]


def non_commercial(licence: str | None) -> bool:
    """Whether a licence forbids commercial use, by its name in any case of letters.

    A choice (`OR`) with a licence that allows it does not; the terms of a private deal (`LicenseRef-…`) are not in its
    name.
    """
    choices = re.split(r"\s+OR\s+", str(licence), flags=re.IGNORECASE)
    return all(re.search(r"(?<!LicenseRef)-NC(?![a-z0-9])", choice, re.IGNORECASE) for choice in choices)


def notice(info: dict[str, Any]) -> str:
    """What a user of this release must know: the licences it inherits, and music that may not be sold; else empty."""
    inherits = info.get("inherited", [])
    lines = [
        f"licence   these weights derive from {_plain(item['model'])}: {_plain(item['licence'] or 'not stated')}"
        + ("; not for commercial use, nor is what is trained from them" if non_commercial(item["licence"]) else "")
        for item in inherits
    ]
    heard: dict[str, None] = {}
    for known in (info.get("training", {}), *inherits):
        names = known.get("data_licences", [])
        named = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        heard |= dict.fromkeys(map(_plain, named))
    if bound := [name for name in heard if non_commercial(name)]:
        more = f" and {len(bound) - 6} more" if len(bound) > 6 else ""
        lines.append(
            f"licence   these weights learned from music under {', '.join(bound[:6])}{more}: ask its rightsholders "
            "before commercial use"
        )
    return "\n".join(lines)


def _plain(text: Any) -> str:
    """A foreign text as one short line that a terminal only prints."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:200])


def initial_state(
    source: str | os.PathLike[str], wanted: config.LMConfig, codec: dict[str, Any], text_encoder: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Weights of a release to train on from, in the shape of the run; those of a mono model are widened for stereo.

    A run with a style or a melody may start from a release without, whose weights then lack those of the new input.

    Args:
        source: what `load_release` takes.
        wanted: the model that will be trained.
        codec, text_encoder: `{name, identity}` of what the run's tokens and captions come from.

    Raises:
        UserError: no release, another shape or pattern, or one made for another codec or text encoder.
    """
    from musicgen import stereo

    name = os.fspath(source)
    loaded, info = load_release(source)
    there = loaded.config
    wider = wanted.num_codebooks == 2 * there.num_codebooks and wanted.pattern.startswith("stereo")
    if wider and there.pattern == "delay":
        there = replace(there, num_codebooks=wanted.num_codebooks, pattern=wanted.pattern)
    for part, word, here in (("codec", "codec", codec), ("text_encoder", "text encoder", text_encoder)):
        identity = info[part]["identity"]
        if wider and part == "codec":
            identity = stereo.identity_of(identity)
        if identity != here["identity"]:
            raise UserError(
                f"INIT={name!r} was trained with {word} {info[part]['name']!r} (identity "
                f"{info[part]['identity'][:12]}…), this run has {here['name']!r} (identity {here['identity'][:12]}…), "
                "whose numbers mean other things; use the one of the release"
            )
    had, given = (settings.flat(settings.to_dict(_alike(c))) for c in (there, wanted))
    # Without weights; see the identities.
    free: tuple[str, ...] = ("dropout", "tail", "condition.text_encoder", "condition.null")
    if not there.condition.style.dim:  # what a model hears beside text can be added to it
        free += tuple(k for k in had if k.startswith("condition.style."))
    if not there.condition.melody:
        free += ("condition.melody", "condition.chroma_frames")
    other = [f"lm.{k}: it has {had[k]!r}, given {given[k]!r}" for k in had if had[k] != given[k] and k not in free]
    if other:
        raise UserError(
            f"INIT={name!r} is a model of another shape:\n  " + "\n  ".join(other) + "\nGive its SIZE and shape"
        )
    return stereo.widen(loaded.state_dict()) if wider else loaded.state_dict()


def _alike(lm: config.LMConfig) -> config.LMConfig:
    """The model without what only says how its attributes are trained: their column, how often they are dropped."""
    attributes = tuple(replace(a, field="", dropout=0.0) for a in lm.condition.attributes)
    return replace(lm, condition=replace(lm.condition, attributes=attributes))


def named(told: Any) -> Any:
    """The same, for others to read: of every absolute path the last part alone is left."""
    if isinstance(told, dict):
        return {key: named(value) for key, value in told.items()}
    if isinstance(told, list):
        return [named(value) for value in told]
    prefix = stereo.PREFIX if isinstance(told, str) and told.startswith(stereo.PREFIX) else ""
    place = files.local_path(told.removeprefix(prefix)) if isinstance(told, str) else None
    return f"{prefix}{place.name}" if place is not None and place.is_absolute() else told
