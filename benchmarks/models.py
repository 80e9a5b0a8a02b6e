"""Models of true shapes with random weights, so that a benchmark pays what the paper's cost without a hub.

The values do not change the speed. The text encoder's tokenizer knows three words: captions keep their lengths and lose
their meaning.
"""

from __future__ import annotations

from pathlib import Path

import torch

from musicgen import config
from musicgen.lm import MusicLM

TEXT_TOKENS = 32


def random_model(size: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MusicLM:
    """A model of a size with random weights, quickly: the values do not change the speed."""
    with torch.device("meta"):
        lm = MusicLM(config.size(size))
    lm = lm.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return lm


def write_t5(folder: Path, *, tiny: bool = False) -> str:
    """Write a text encoder of T5-base's shape where `TextEncoder.load` reads it; 438 MB. Returns the folder as a name.

    Args:
        tiny: keep only the width.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    small = {"num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 64} if tiny else {"vocab_size": 32128}
    shape = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, **small}
    T5EncoderModel(T5Config(**shape)).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    words.save_pretrained(folder)
    return str(folder)
