"""Audio to codes and back: the EnCodec network of `transformers`, behind three methods.

`load("demo")` is the codec that ships in `musicgen/assets/codec/`; any folder written by `transformers` or by our own
trainer, and any hub name, loads the same way. A codec is known by its `identity`, a hash of the tensors that decide
codes and sound and of the settings that shape them; shards and releases carry it, and mixing codecs is refused by name.

Weights are stored as float16 without the running statistics of codebook training, and used in float32. Whole tracks
are encoded in overlapping windows whose context is thrown away, and never together with another track, so that a
track's codes depend on the track alone. Encoding runs in `musicgen.seanet`, decoding in `transformers`. Architecture:
Défossez et al. 2022; settings of the 32 kHz model: Copet et al. 2023, section 3.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from musicgen import files, seanet
from musicgen.errors import UserError

if TYPE_CHECKING:
    from transformers import EncodecConfig, EncodecModel

DEMO_FOLDER = Path(__file__).parent / "assets" / "codec"
TRAINING_BUFFERS = (".inited", ".cluster_size", ".embed_avg")
WINDOW_FRAMES = 2000
CONTEXT_FRAMES = 400
PIECE_WINDOWS = 8
CHUNK_LEVEL = 0.1


@dataclass(frozen=True)
class CodecConfig:
    """Shape of an EnCodec network; the defaults are the paper's 32 kHz model (56.9 M parameters).

    Args:
        sample_rate_hz: rate of the audio.
        channels: audio channels.
        num_filters: width of the first convolution; doubles at each of the strides.
        hidden_size: width of the latents and of the codebook vectors.
        ratios: upsampling ratios in decoder order; their product is the hop.
        num_lstm_layers: recurrent layers at the lowest rate.
        num_codebooks: residual quantiser levels K.
        codebook_size: entries per codebook, a power of two.
    """

    sample_rate_hz: int = 32_000
    channels: int = 1
    num_filters: int = 64
    hidden_size: int = 128
    ratios: tuple[int, ...] = (8, 5, 4, 4)
    num_lstm_layers: int = 2
    num_codebooks: int = 4
    codebook_size: int = 2048

    @property
    def hop(self) -> int:
        """Audio samples per frame."""
        return int(np.prod(self.ratios))


CODEC_SIZES: dict[str, CodecConfig] = {
    "demo": CodecConfig(num_filters=16, hidden_size=64, ratios=(4, 4, 5, 8), num_lstm_layers=1),
    "32khz": CodecConfig(),
}


def network_config(config: CodecConfig) -> EncodecConfig:
    """The shape as `transformers` writes it: by a bandwidth, from which it counts the codebooks back."""
    from transformers import EncodecConfig

    per_codebook = -(-config.sample_rate_hz // config.hop) * (config.codebook_size.bit_length() - 1)
    kbit_per_second = config.num_codebooks * per_codebook / 1000
    while 1000 * kbit_per_second // per_codebook < config.num_codebooks:  # rounded to just below: one too few
        kbit_per_second = math.nextafter(kbit_per_second, math.inf)
    return EncodecConfig(
        target_bandwidths=[kbit_per_second],
        sampling_rate=config.sample_rate_hz,
        audio_channels=config.channels,
        normalize=False,
        hidden_size=config.hidden_size,
        num_filters=config.num_filters,
        num_residual_layers=1,
        upsampling_ratios=list(config.ratios),
        use_causal_conv=False,
        use_conv_shortcut=False,
        pad_mode="reflect",
        num_lstm_layers=config.num_lstm_layers,
        codebook_size=config.codebook_size,
    )


def build(config: CodecConfig) -> EncodecModel:
    """A `transformers.EncodecModel` of this shape with fresh weights (codebooks are zero until trained)."""
    from transformers import EncodecModel

    return EncodecModel(network_config(config))


def save(model: EncodecModel, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write `config.json` and `model.safetensors` (no training buffers); whole or absent.

    The folder loads with `musicgen.codec.load` and with `transformers.EncodecModel.from_pretrained`.

    Raises:
        UserError: the config.json that stands there is of another kind of model.
    """
    import os
    import tempfile

    from safetensors.torch import save as packed

    folder = Path(folder)
    if (folder / "config.json").exists() and files.model_type(folder) != "encodec":
        raise UserError(f"{folder} holds another kind of model, which would be lost; give a new folder for the codec")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().to("cpu", dtype).contiguous()
        for k, v in model.state_dict().items()
        if not k.endswith(TRAINING_BUFFERS)
    }
    settings = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    settings.pop("transformers_version", None)
    settings["architectures"] = ["EncodecModel"]
    settings["dtype"] = "float32"  # 16 bits are how the weights are kept; a network of 16 bits takes no sound
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Written by ourselves: safetensors' own files are for their owner alone.
        (Path(scratch) / "model.safetensors").write_bytes(packed(tensors, metadata={"format": "pt"}))
        (Path(scratch) / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=list) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(Path(scratch) / name, folder / name)
    return folder


class Codec:
    """A frozen EnCodec in float32.

    Attributes:
        name: what was asked for: `demo`, a folder, or a hub name.
        identity: sha256 of loaded tensors and settings, hex.
        sample_rate, channels, hop, frame_rate, num_codebooks, codebook_size: see `CodecConfig`.
    """

    def __init__(self, model: EncodecModel, name: str, kbit_per_second: float | None = None) -> None:
        self.name = name
        self.num_codebooks: int = _codebooks(model, name, kbit_per_second)
        self.identity = _identity(model, self.num_codebooks)
        self.model = _fold_weight_norm(model.float().eval().requires_grad_(False))
        config = model.config
        self.sample_rate: int = config.sampling_rate
        self.channels: int = config.audio_channels
        self.hop: int = config.hop_length
        self.frame_rate: int = config.frame_rate
        self.codebook_size: int = config.codebook_size
        self.chunk: int = config.chunk_length or 0
        self.level: float = CHUNK_LEVEL if config.normalize else 1.0
        self.encoder = self._fast_encoder()

    def to(self, device: str | torch.device) -> Codec:
        """Move the network; returns self."""
        self.model.to(device)  # type: ignore[arg-type]
        self.encoder = self._fast_encoder()
        return self

    def _fast_encoder(self) -> seanet.Encoder | None:
        return seanet.Encoder(self.model, self.num_codebooks) if seanet.supports(self.model) else None

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Audio `[B, C, N]` at `sample_rate` to codes `[B, K, ceil(N / hop)]` int64.

        Raises:
            UserError: wrong number of channels, no samples, or samples that are not finite.
        """
        wave = self._checked(audio).to(self.device, torch.float32)
        if self.encoder is not None and wave.shape[-1] >= seanet.SHORT_FRAMES * self.hop:
            return self.encoder.quantise(self.encoder.latents(wave))
        pieces = (wave / self.level).split(self.chunk or wave.shape[-1], dim=-1)
        codes = [self.model.quantizer.encode(self.model.encoder(piece), None) for piece in pieces]
        return torch.cat(codes, dim=-1)[: self.num_codebooks].transpose(0, 1)

    def _checked(self, audio: Tensor) -> Tensor:
        """`audio` itself when it is `[B, C, N ≥ 1]` and finite."""
        if audio.ndim != 3 or audio.shape[1] != self.channels or audio.shape[2] == 0:
            raise UserError(
                f"codec {self.name!r} takes audio [batch, {self.channels}, samples ≥ 1]; got shape {list(audio.shape)}"
            )
        if not bool(torch.isfinite(audio).all()):
            raise UserError("the audio holds samples that are not finite (NaN or infinity); repair it or leave it out")
        return audio

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, T]` to audio `[B, C, hop * T]` float32; see `check_codes` for what it refuses."""
        self.check_codes(codes)
        latents = self.embed(codes)
        if not self.chunk:
            return self.model.decoder(latents)
        pieces = latents.split(self.chunk // self.hop, dim=-1)
        return torch.cat([self.model.decoder(piece) for piece in pieces], dim=-1) * self.level

    def check_codes(self, codes: Tensor) -> None:
        """Refuse codes `[B, K, T]` that are not of this codec.

        Raises:
            UserError: another number of codebooks, or ids outside `0 … codebook_size - 1`.
        """
        if codes.ndim != 3 or codes.shape[1] != self.num_codebooks:
            raise UserError(
                f"codec {self.name!r} has {self.num_codebooks} codebooks and takes codes of shape "
                f"[batch, {self.num_codebooks}, frames]; got {list(codes.shape)}"
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.codebook_size):
            raise UserError(
                f"codes must lie in 0…{self.codebook_size - 1}; got {int(codes.min())}…{int(codes.max())} "
                "(a special token left in, or tokens of another codec)"
            )

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Quantised latents of codes `[B, K, T]`: `[B, H, T]` float32, the decoder's input."""
        return self.model.quantizer.decode(codes.to(self.device).transpose(0, 1))

    @torch.no_grad()
    def encode_track(
        self, audio: np.ndarray, *, window_frames: int = WINDOW_FRAMES, context_frames: int = CONTEXT_FRAMES
    ) -> np.ndarray:
        """A whole track `[C, N]` float32 to codes `[K, ceil(N / hop)]` int16, in windows with context thrown away.

        The convolutions are computed as for the whole track; the LSTM starts anew for each window of `window_frames`,
        `context_frames` before it. The windows of one track pass it together, 8 at a time: the codes depend on the
        track and these two numbers, never on what else is being encoded.

        Raises:
            UserError: as `encode`, and for a window without frames.
        """
        if window_frames < 1 or context_frames < 0:
            raise UserError(f"a window keeps ≥ 1 frames after ≥ 0 of context; got {window_frames} and {context_frames}")
        wave = self._checked(torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))[None])
        total = -(-wave.shape[-1] // self.hop)
        if self.encoder is None or total < seanet.SHORT_FRAMES:
            return self.encode(wave)[0].to(torch.int16).cpu().numpy()
        margin, parts, start = self.encoder.margin_frames, [], 0
        while start < total:
            stop = start + PIECE_WINDOWS * window_frames
            if total - stop < window_frames:  # a last sliver is encoded with its neighbour
                stop = total
            first, last = max(0, start - context_frames - margin), min(total, stop + margin)
            piece = wave[..., first * self.hop : last * self.hop].to(self.device)
            latents = self.encoder.latents_in_windows(piece, window_frames, context_frames)
            codes = self.encoder.quantise(latents[..., start - first : stop - first])[0]
            parts.append(codes.to(torch.int16).cpu().numpy())
            start = stop
        return np.concatenate(parts, axis=1)


def load(source: str | Path = "demo", *, device: str | torch.device = "cpu") -> Codec:
    """A codec by name: `demo` (embedded), a folder, or a hub name such as `facebook/encodec_32khz`.

    `encodec:24khz` and `encodec:48khz` are the models of the `encodec` package, where it is installed. `@6` behind a
    name takes the codebooks of 6 kbit/s from a codec that has several rates.

    The 48 kHz model scales every second of audio to unit level and keeps the scale beside the codes. Tokens have no
    place for it, so its audio is divided by 0.1 throughout instead, and encoded second by second without overlap.

    `stereo:` before any mono codec makes two channels of it (`musicgen.stereo`).

    Raises:
        UserError: nothing there, or not an EnCodec; says what was tried and what to do.
    """
    name = str(source)
    if name.startswith("stereo:"):
        from musicgen.stereo import StereoCodec

        return StereoCodec(load(name.removeprefix("stereo:"), device=device))
    rated = None if Path(name).is_dir() else re.fullmatch(r"(.+)@([\d.]+)", name)
    place, kbit = (rated[1], float(rated[2])) if rated else (name, None)
    return Codec(load_network(place), name, kbit).to(device)


def load_network(source: str | Path) -> EncodecModel:
    """The network of a codec's name as `transformers` runs it, float32, on the CPU; raises as `load`."""
    from transformers import EncodecModel

    name = str(source)
    if name.startswith("encodec:"):
        from musicgen import encodec_package

        return encodec_package.load(name.removeprefix("encodec:"))
    folder = DEMO_FOLDER if name == "demo" else Path(name)
    if name == "demo" and not (folder / "model.safetensors").is_file():
        raise UserError("the embedded demo codec is not in musicgen/assets/codec; rebuild it with `make assets`")
    target: str = name
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise UserError(f"CODEC {name!r} has no config.json and model.safetensors; give the folder of a codec")
        kind = files.model_type(folder)
        if kind is None:
            raise UserError(f"CODEC {name!r}: its config.json cannot be read or names no model; copy it again")
        if kind != "encodec":
            raise UserError(f"CODEC {name!r} holds a model of type {kind!r}; an EnCodec folder is needed")
        target = str(folder)
    elif name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"CODEC {name!r} is neither 'demo', nor a folder here, nor a hub name (owner/model)")
    with _quiet_transformers():
        try:
            load: Any = EncodecModel.from_pretrained
            model, report = load(target, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        except OSError as error:
            raise UserError(
                f"CODEC {name!r} is not here and could not be had from the hub ({type(error).__name__}). "
                "Copy the model's folder to this machine and give its path, or use CODEC=demo"
            ) from error
        except Exception as error:  # what transformers and safetensors raise for files that are cut short or altered
            raise UserError(
                f"CODEC {name!r}: the folder is damaged or no EnCodec of transformers "
                f"({type(error).__name__}: {' '.join(str(error).split())[:150]}); copy it again"
            ) from error
    lost = sorted(key for key in report["missing_keys"] if not key.endswith(TRAINING_BUFFERS))
    if lost:
        raise UserError(
            f"CODEC {name!r}: weights are missing ({', '.join(lost[:3])}, {len(lost)} in all); copy it again"
        )
    return model.eval()


def tiny(seed: int = 0) -> Codec:
    """A small random codec with the demo's rates and codebooks, for tests: four filters, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build(CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1))
        spread = float(
            f"{model.encoder(torch.randn(1, 1, 32_000) * 0.1).std().item():.1g}"
        )  # equal on any thread count
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_(std=spread)
    return Codec(model, "tiny")


def describe(codec: Codec) -> dict[str, object]:
    """What a data set or a release records about its codec."""
    return {
        "name": codec.name,
        "identity": codec.identity,
        "sample_rate_hz": codec.sample_rate,
        "channels": codec.channels,
        "frame_rate": codec.frame_rate,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
    }


def _codebooks(model: EncodecModel, name: str, kbit_per_second: float | None) -> int:
    """Codebooks in use: all, or those of one of the network's bandwidths."""
    config = model.config
    if kbit_per_second is None:
        return config.num_quantizers
    if kbit_per_second not in config.target_bandwidths:
        allowed = ", ".join(f"{rate:g}" for rate in config.target_bandwidths)
        raise UserError(f"CODEC {name!r}: {kbit_per_second:g} kbit/s is none of the codec's rates; it has {allowed}")
    return model.quantizer.get_num_quantizers_for_bandwidth(kbit_per_second)


def _identity(model: EncodecModel, num_codebooks: int) -> str:
    """sha256 over settings and float32 tensors, by name, without the training buffers."""
    config = model.config
    shape = CodecConfig(
        sample_rate_hz=config.sampling_rate,
        channels=config.audio_channels,
        num_filters=config.num_filters,
        hidden_size=config.hidden_size,
        ratios=tuple(config.upsampling_ratios),
        num_lstm_layers=config.num_lstm_layers,
        num_codebooks=num_codebooks,
        codebook_size=config.codebook_size,
    )
    rest = {
        name: getattr(config, name)
        for name in (
            "normalize", "norm_type", "kernel_size", "last_kernel_size", "residual_kernel_size", "pad_mode", "compress",
            "dilation_growth_rate", "use_causal_conv", "use_conv_shortcut", "num_residual_layers", "trim_right_ratio",
        )
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps([asdict(shape), rest], sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(TRAINING_BUFFERS):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fold_weight_norm(model: EncodecModel) -> EncodecModel:
    """Replace the weight-norm parametrisation by its product: same function, fewer operations per call."""
    from torch.nn.utils import parametrize

    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")  # type: ignore[arg-type]
    return model


class _quiet_transformers:
    """Keep `transformers` from reporting the training buffers that our files leave out on purpose."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self.level = hf_logging.get_verbosity()
        hf_logging.set_verbosity(logging.ERROR)
        hf_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self.level)
        hf_logging.enable_progress_bar()
