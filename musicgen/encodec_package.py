"""The 24 and 48 kHz models of the `encodec` package as codecs of this house; the only file that imports it.

`CODEC=encodec:24khz` (or `encodec:24khz@6`, at 6 kbit/s) has the package fetch its weights, copies them into
`transformers.EncodecModel`, which is the same network, and prints the licences. The package is an extra because its
registry release is CC-BY-NC-4.0 and needs torchaudio. Weights come as a state dict that torch reads without unpickling
anything but tensors, checked against the hash in their name. Models: Défossez et al. 2022.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from musicgen.errors import UserError

if TYPE_CHECKING:
    from transformers import EncodecModel

MODELS = ("24khz", "48khz")
WEIGHTS_LICENCE = "CC-BY-NC-4.0 (not for commercial use)"


def load(model: str) -> EncodecModel:
    """A model of the package, `24khz` or `48khz`, as `transformers` network in float32; prints the licences.

    Raises:
        UserError: another name, the package is not installed, or its weights could not be fetched.
    """
    if model not in MODELS:
        raise UserError(f"CODEC 'encodec:{model}' is none of the package's models; take {' or '.join(MODELS)}")
    package = imported()
    print(licence(), file=sys.stderr)
    try:
        theirs = getattr(package.EncodecModel, f"encodec_model_{model}")()
    except OSError as error:
        raise UserError(
            f"the weights of CODEC 'encodec:{model}' could not be fetched ({type(error).__name__}: {error}); put the "
            "file into torch's hub cache (TORCH_HOME/hub/checkpoints), or train a codec of your own with `make codec`"
        ) from error
    return convert(theirs)


def imported() -> Any:
    """The package itself; raises `UserError` where it cannot be imported."""
    try:
        import encodec
    except (ImportError, OSError) as error:  # a torchaudio of another torch build raises OSError
        raise UserError(
            f"the package `encodec` cannot be imported ({error}); install the extra with "
            "`pip install 'musicgen-pipeline[encodec]'`, beside a CPU build of torch with torchaudio from "
            "https://download.pytorch.org/whl/cpu. Its licence is CC-BY-NC-4.0; the other codecs do not need it"
        ) from error
    return encodec


def licence() -> str:
    """A line that names the licences of the package as installed and of its weights."""
    try:
        about = importlib.metadata.metadata("encodec").json
        version, terms = about["version"], about.get("license", "not stated")
    except importlib.metadata.PackageNotFoundError:
        version, terms = "of unknown version", "not stated"
    return f"encodec {version}: licence of the package: {terms}; of its weights: {WEIGHTS_LICENCE}"


def convert(theirs: Any) -> EncodecModel:
    """A model of the package as `transformers.EncodecModel` with the same weights.

    Raises:
        UserError: a tensor is missing or left over, so that the networks would not be the same.
    """
    from transformers import EncodecConfig, EncodecModel

    norm = "time_group_norm" if theirs.normalize else "weight_norm"
    model = EncodecModel(
        EncodecConfig(
            target_bandwidths=[float(rate) for rate in theirs.target_bandwidths],
            sampling_rate=theirs.sample_rate,
            audio_channels=theirs.channels,
            normalize=theirs.normalize,
            chunk_length_s=theirs.segment,
            overlap=theirs.overlap if theirs.segment else None,
            norm_type=norm,
            use_causal_conv=not theirs.normalize,
            codebook_size=theirs.quantizer.bins,
        )
    )
    tensors = {_name(name): tensor for name, tensor in theirs.state_dict().items()}
    missing, left_over = model.load_state_dict(tensors, strict=False)
    if missing or left_over:
        raise UserError(f"this release of encodec has another network: missing {missing[:3]}, unknown {left_over[:3]}")
    return model.float().eval()


def _name(name: str) -> str:
    """A tensor's name in the package to its name in `transformers`."""
    name = name.replace("quantizer.vq.layers.", "quantizer.layers.").replace("._codebook.", ".codebook.")
    name = name.replace("encoder.model.", "encoder.layers.").replace("decoder.model.", "decoder.layers.")
    name = name.replace(".convtr.convtr.", ".conv.").replace(".convtr.norm.", ".norm.")
    name = name.replace(".conv.conv.", ".conv.").replace(".conv.norm.", ".norm.")
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")
