"""Checks of decoded audio: each one returns None or a `Reject` with a reason code.

The codes are fixed here, once, for every stage: they are what the rejects table, the data card and the people who
mend a catalogue speak about. Audio checks see the sound as it was delivered (source rate, all channels, before any
resampling) and measure; none of them changes a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CODES = {
    # catalogue and rights
    "invalid_row": "the catalogue row breaks the schema",
    "no_licence": "no licence that can be recognised",
    "no_consent": "no evidence of consent",
    "no_rightsholder": "nobody is named as rightsholder",
    "no_term": "no term: first or last day unknown",
    "no_status": "status unknown",
    "not_granted": "the purpose is not granted",
    "not_yet_valid": "the term has not begun",
    "expired": "the term has ended",
    "territory": "the territory is not covered",
    "opt_out": "an opt-out signal was seen",
    "withdrawn": "withdrawn by the rightsholder",
    # source and decoding
    "missing": "no file at the address",
    "not_audio": "the file is not audio",
    "truncated": "the file ends before its declared length",
    "decode": "the file is damaged",
    "duration_mismatch": "much longer than the file declares",
    "stem_mismatch": "a stem is not as long as its track, or not of it",
    "no_melody": "its stems are drums and bass alone",
    "crash": "the decoder crashed on it",
    "timeout": "decoding took too long",
    "oom": "decoding needs too much memory",
    # the sound itself
    "too_short": "shorter than allowed",
    "too_long": "longer than allowed",
    "silent": "silence",
    "clipped": "clipped",
    "dc": "constant offset",
    "phase": "channels cancel each other",
    "duplicate": "the same sound as another row",
    # tokens and text
    "codec_nonfinite": "the codec saw values that are not finite",
    "caption_empty": "nothing to say about it",
}


@dataclass(frozen=True)
class Reject:
    """Why a row did not become a track.

    Attributes:
        stage: catalogue, rights, source, decode, check, duplicate, codec or caption.
        code: a key of `CODES`.
        message: the reason in words, with the figures that decided.
    """

    stage: str
    code: str
    message: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown reject code {self.code!r}")


@dataclass(frozen=True)
class CheckConfig:
    """Limits of the audio checks.

    Args:
        min_seconds: shortest track.
        max_seconds: longest track; also bounds the memory of decoding.
        max_bad_packets: reject as `decode` when a larger share of a file's packets cannot be decoded.
        silence_dbfs: a 0.1 s frame whose RMS is below this is silent.
        max_silent_share: reject when more of the frames are silent.
        max_clipped_share: reject when more of the samples lie in runs of three or more at full scale.
        max_dc: reject when a channel's mean is farther from zero (full scale = 1).
        min_correlation: reject stereo whose channels correlate less: their mean would cancel.
    """

    min_seconds: float = 2.0
    max_seconds: float = 1800.0
    max_bad_packets: float = 0.01
    silence_dbfs: float = -60.0
    max_silent_share: float = 0.8
    max_clipped_share: float = 0.01
    max_dc: float = 0.1
    min_correlation: float = -0.8


def length(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`too_short` or `too_long` for pcm [C, N]."""
    seconds = pcm.shape[1] / sample_rate_hz
    if seconds < limits.min_seconds:
        return Reject("check", "too_short", f"{seconds:.2f} s, at least {limits.min_seconds:g} s are needed")
    if seconds > limits.max_seconds:
        return Reject("check", "too_long", f"{seconds:.0f} s, at most {limits.max_seconds:g} s are allowed")
    return None


def silence(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`silent` when too many 0.1 s frames of pcm [C, N] lie below the threshold (the loudest channel counts)."""
    frame = max(1, sample_rate_hz // 10)
    count = max(1, pcm.shape[1] // frame)
    framed = pcm[:, : count * frame].reshape(pcm.shape[0], count, -1)
    power = np.einsum("cfn,cfn->cf", framed, framed, dtype=np.float64).max(0) / framed.shape[2]
    share = float(np.mean(power < 10 ** (limits.silence_dbfs / 10)))
    if share > limits.max_silent_share:
        return Reject("check", "silent", f"{share:.0%} of the time is below {limits.silence_dbfs:g} dBFS")
    return None


def clipping(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`clipped` when too many samples of pcm [C, N] lie in runs of three or more at full scale with one sign."""
    if pcm.shape[1] < 3 or float(np.abs(pcm).max(initial=0.0)) < 0.99:
        return None
    clipped = 0
    for full in (pcm >= 0.99, pcm <= -0.99):
        core = full[:, :-2] & full[:, 1:-1] & full[:, 2:]
        run = np.zeros_like(full)
        for shift in range(3):
            run[:, shift : shift + core.shape[1]] |= core
        clipped += int(run.sum())
    share = clipped / pcm.size
    if share > limits.max_clipped_share:
        peak = float(np.abs(pcm).max())
        above = f" or above it: peak {peak:.3g} times full scale, a lower level would pass" if peak > 1.1 else ""
        return Reject("check", "clipped", f"{share:.1%} of the samples sit at full scale{above}")
    return None


def offset(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`dc` when the mean of a channel of pcm [C, N] is far from zero."""
    worst = float(np.abs(pcm.mean(1, dtype=np.float64)).max())
    if worst > limits.max_dc:
        return Reject("check", "dc", f"mean level {worst:.3f} of full scale, at most {limits.max_dc:g} is allowed")
    return None


def phase(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`phase` when the two channels of pcm [2, N] cancel each other in their mean; other layouts pass."""
    if pcm.shape[0] != 2:
        return None
    left, right = pcm
    energy = float(np.sqrt(np.dot(left, left)) * np.sqrt(np.dot(right, right)))
    if energy <= 0:
        return None
    correlation = float(np.dot(left, right)) / energy
    if correlation < limits.min_correlation:
        return Reject("check", "phase", f"left and right correlate {correlation:.2f}: their mean would cancel")
    return None


def finite(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """`decode` when damage left values that no recording holds (not finite, or far above full scale)."""
    peak = float(np.abs(pcm).max(initial=0.0))  # NaN and infinity survive the maximum
    if not np.isfinite(peak) or peak > 8.0:
        return Reject("decode", "decode", f"decoded values reach {peak:g} times full scale")
    return None


ORDER = (length, finite, silence, clipping, offset, phase)


def first(pcm: np.ndarray, sample_rate_hz: int, limits: CheckConfig) -> Reject | None:
    """The first check, in `ORDER`, that pcm [C, N] fails; None when it passes all."""
    for check in ORDER:
        problem = check(pcm, sample_rate_hz, limits)
        if problem is not None:
            return problem
    return None
