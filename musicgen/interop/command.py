"""`make import FROM=… OUT=…`, `make export MODEL=… TO=transformers|audiocraft OUT=…`, `make merge MODEL=… OUT=…`.

python -m musicgen.interop.command import --source facebook/musicgen-small --out models/small
python -m musicgen.interop.command export --model models/small --to transformers --out exported
python -m musicgen.interop.command merge --model runs/mine/release --out models/mine
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musicgen import files, settings, weights
from musicgen.errors import UserError


@dataclass(frozen=True)
class ImportConfig:
    """Another project's MusicGen as a release of ours.

    Args:
        source: a transformers folder, a folder with audiocraft's exported files, or a hub name.
        out: the release folder to write.
        codec: name or folder of the codec, where audiocraft's files only name it and it stands elsewhere.
        text_encoder: the same for the text encoder.
        licence: of the weights, where the source does not say; another one than it says is refused.
    """

    source: str = ""
    out: str = ""
    codec: str = ""
    text_encoder: str = ""
    licence: str = ""


@dataclass(frozen=True)
class ExportConfig:
    """A release of ours for other programs.

    Args:
        model: `demo` or a release folder; an adapter is merged first.
        base: the model that an adapter was made for, where it stands elsewhere than in training.
        to: transformers (a folder for from_pretrained and the text-to-audio pipeline) or audiocraft (its two files).
        out: the folder to write.
        codec: codec name or folder, where the one the release names stands elsewhere.
        text_encoder: the same for the text encoder.
        text_encoder_name: what audiocraft shall call the text encoder, such as t5-base.
    """

    model: str = "demo"
    base: str = ""
    to: Literal["transformers", "audiocraft"] = "transformers"
    out: str = ""
    codec: str = ""
    text_encoder: str = ""
    text_encoder_name: str = ""


@dataclass(frozen=True)
class MergeConfig:
    """An adapter and its base as one whole release.

    Args:
        model: an adapter's folder (the release/ of a run with LORA=).
        out: the release folder to write.
        base: the model that the adapter was made for, where it stands elsewhere than in training.
    """

    model: str = ""
    out: str = ""
    base: str = ""


def _check_new(out: str, example: str) -> Path:
    """The folder to write, which must be new or empty: nothing that stands there is replaced."""
    target = files.local_path(out) if out else None
    if target is None or not target.name:
        raise UserError(f"OUT={out!r}: give the local folder to write, such as OUT={example}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"OUT={out!r} exists and is not empty; give a new folder")
    return target


def import_model(config: ImportConfig) -> Path:
    """Write the release; returns its folder. Raises `UserError`."""
    from musicgen.interop import parts, sources

    if not config.source:
        raise UserError(f"FROM is missing; give a folder or a hub name such as FROM={sources.PUBLISHED[0]}")
    if not config.out:
        raise UserError("OUT is missing; give the release folder to write, such as OUT=models/small")
    _check_new(config.out, "models/small")
    model = sources.read(config.source, config.codec, config.text_encoder)
    given = parts.stated(config.licence)
    if given and model.licence and given.casefold() != model.licence.casefold():
        raise UserError(
            f"licence is {config.licence!r}, but FROM={config.source!r} says that it is under {model.licence!r}, which "
            "goes along with it; leave --licence out: it is for sources that state none"
        )
    model.licence = model.licence or given
    return parts.to_release(model, config.out)


def export_model(config: ExportConfig) -> Path:
    """Write the export, whole or absent; returns its folder. Raises `UserError`."""
    from musicgen.interop import audiocraft, huggingface, parts

    target = _check_new(config.out, "exported")
    model = parts.of_release(config.model, config.codec, config.text_encoder, config.base)
    if not model.config.cross_attention and model.config.condition.null != "released":
        print(
            f"warning: {config.model} was trained with condition.null {model.config.condition.null}; other programs "
            "guide against the released models' null, so that guided music differs there (guidance 1 does not). Train "
            "with --lm.condition.null released for exports",
            file=sys.stderr,
        )
    write: Callable[[Path], None]
    if config.to == "transformers":
        huggingface.check(model)
        write = lambda folder: huggingface.write(model, folder)  # noqa: E731
    else:
        name, width = audiocraft.check(model, config.text_encoder_name), model.config.condition.text_dim
        if audiocraft.TEXT_ENCODERS[name] != width:
            print(
                f"warning: {config.model} hears text of width {width} and {name} gives "
                f"{audiocraft.TEXT_ENCODERS[name]}: audiocraft, which fetches its encoder by name, will not load it",
                file=sys.stderr,
            )
        write = lambda folder: audiocraft.write(model, folder, config.text_encoder_name)  # noqa: E731
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {config.out!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def merge_model(config: MergeConfig) -> Path:
    """Write base and adapter as one release in float32; returns its folder. Raises `UserError`."""
    if not config.model:
        raise UserError("MODEL is missing; give an adapter's folder such as MODEL=runs/mine/release")
    _check_new(config.out, "models/mine")
    info = weights.read_info(config.model)
    if info["format"] != weights.ADAPTER:
        raise UserError(f"MODEL={config.model!r} is a whole model already, not an adapter; nothing to merge")
    lm, info = weights.load_release(config.model, config.base, quiet=True)
    folders = {}
    for part in ("codec", "text_encoder"):
        if name := info[part].get("folder"):  # the base has its own copy
            folders[name] = Path(weights.place_of(config.model, info, part, config.base).removeprefix("stereo:"))
    made_of = {"base": info.pop("base"), "adapter": info["weights"]["sha256"]}
    return weights.save_release(config.out, lm, {**info, "merged": made_of}, folders=folders)


def main(argv: Sequence[str]) -> int:
    """`import`, `export` or `merge`; see `ImportConfig`, `ExportConfig` and `MergeConfig`."""
    prog = "python -m musicgen.interop.command"
    if argv and argv[0] == "import":
        folder = import_model(settings.parse(ImportConfig, argv[1:], prog=f"{prog} import"))
        info = weights.read_info(folder)
        if text := weights.notice(info):
            print(text, file=sys.stderr)
        kind = "melody" if info["lm"]["condition"]["melody"] else "text"
        print(
            f"{folder}: {kind} model, {info['weights']['parameters']:,} parameters, pattern {info['lm']['pattern']}, "
            f"licence {info['licence']}; use it as MODEL={folder}"
        )
        return 0
    if argv and argv[0] == "export":
        config = settings.parse(ExportConfig, argv[1:], prog=f"{prog} export")
        folder = export_model(config)
        names = ", ".join(sorted(p.name for p in folder.iterdir()))
        print(f"{folder}: for {config.to}: {names}")
        return 0
    if argv and argv[0] == "merge":
        folder = merge_model(settings.parse(MergeConfig, argv[1:], prog=f"{prog} merge"))
        info = weights.read_info(folder)
        if text := weights.notice(info):
            print(text, file=sys.stderr)
        print(f"{folder}: {info['weights']['parameters']:,} parameters, a whole model; use it as MODEL={folder}")
        return 0
    raise UserError(f"give 'import', 'export' or 'merge' first, not {argv[0] if argv else 'nothing'!r}")


if __name__ == "__main__":
    settings.run(main)
