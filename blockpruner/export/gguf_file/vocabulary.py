"""A tokenizer as a GGUF file stores it. Knows two kinds: byte-level BPE, and BPE that spells rare text in bytes.

The second kind is what SentencePiece models of Llama's family are as `tokenizer.json`. llama.cpp joins the two
neighbours whose union has the highest score, where BPE takes the earliest merge: so a token's score is its merge's
place, negative. What llama.cpp would split in another way than the tokenizer does is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import TokenType

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.loading import load_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
"""The patterns that cut text into words, by llama.cpp's name for each."""
_WORD_START = "▁"
_EXTRA_SPACES = re.compile(r"(?:\\A|\\z|\^|\$|[ +|]|\{2,\})+")
"""A pattern of spaces alone, at the ends of a text or in a row."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that the file says of a tokenizer."""

    model: Literal["gpt2", "llama"]
    """llama.cpp's name of the kind."""
    pre: str
    """llama.cpp's name of how text is cut into words."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    """Of the first kind."""
    scores: tuple[float, ...]
    """Of the second kind."""
    special_ids: Mapping[str, int]
    """By role: bos, eos, unk, pad."""
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    """Whether a text begins with a space that is not in it."""
    drops_spaces: bool
    """Whether spaces at the ends of a text, and all but one in a row, are left out: llama.cpp does not do that."""
    chat_template: str | None


def read_vocabulary(checkpoint: Checkpoint, vocab_size: int) -> Vocabulary:
    """The tokenizer beside a model.

    Args:
        checkpoint: the model.
        vocab_size: how many tokens the file must have: as many as the embedding has rows.

    Raises:
        ExportError: if it is of a kind that is not known here.
        CheckpointError: if there is none.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it is no tokenizer.json, and has none")
    parts: dict[str, Any] = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unknown(f"its model is {model['type']}, and BPE is known here")
    spells_bytes = bool(model.get("byte_fallback"))
    tokens = _tokens(parts, vocab_size)
    merges = tuple(" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    adds_bos, adds_eos = _additions(backend, tokenizer)
    spaces = _spaces(parts) if spells_bytes else _Spaces()
    return Vocabulary(
        model="llama" if spells_bytes else "gpt2",
        pre="default" if spells_bytes else _word_splitting(parts),
        tokens=tokens,
        types=_types(parts, tokens, spells_bytes),
        merges=() if spells_bytes else merges,
        scores=_scores(tokens, merges) if spells_bytes else (),
        special_ids=_special_ids(tokenizer),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_space=spaces.adds,
        drops_spaces=spaces.drops,
        chat_template=_chat_template(tokenizer),
    )


def _unknown(reason: str) -> ExportError:
    return ExportError(f"format gguf cannot hold this model's tokenizer ({reason})")


def _tokens(parts: Mapping[str, Any], vocab_size: int) -> tuple[str, ...]:
    """All tokens by id; rows of the embedding that belong to none get a name of their own."""
    ids: dict[str, int] = dict(parts["model"]["vocab"])
    ids |= {added["content"]: added["id"] for added in parts["added_tokens"]}
    by_id = {number: token for token, number in ids.items()}
    if max(by_id) >= vocab_size:
        raise _unknown(f"it has the token id {max(by_id)}, and the model embeds {vocab_size}")
    return tuple(by_id.get(number, f"[PAD{number}]") for number in range(vocab_size))


def _types(parts: Mapping[str, Any], tokens: tuple[str, ...], spells_bytes: bool) -> tuple[int, ...]:
    special = {added["content"]: bool(added["special"]) for added in parts["added_tokens"]}
    known, unknown_token = set(parts["model"]["vocab"]) | set(special), parts["model"].get("unk_token")

    def type_of(token: str) -> TokenType:
        if token not in known:
            return TokenType.UNUSED
        if token == unknown_token:
            return TokenType.UNKNOWN
        if token in special:
            return TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        return TokenType.BYTE if spells_bytes and _BYTE.fullmatch(token) else TokenType.NORMAL

    return tuple(int(type_of(token)) for token in tokens)


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """A token's score is the place of the first merge that makes it; those that none makes come last."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault(merge.replace(" ", ""), place)
    return tuple(-float(places.get(token, len(merges))) for token in tokens)


def _word_splitting(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text into words."""
    if (parts["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise _unknown(f"it normalises text by {parts['normalizer']['type']}, which llama.cpp does not")
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown("it is neither byte-level nor does it spell rare text in bytes")
    if not splits and last["use_regex"]:
        return "gpt-2"
    if len(splits) == 1 and splits[0]["type"] == "Digits" and splits[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if len(splits) == 1 and splits[0]["type"] == "Split" and not last["use_regex"]:
        name = _SPLITS.get(splits[0]["pattern"].get("Regex", ""))
        if name and splits[0]["behavior"] == "Isolated" and not splits[0]["invert"]:
            return name
    raise _unknown("it cuts text into words in a way whose name in llama.cpp is not known here")


@dataclass(frozen=True)
class _Spaces:
    """What becomes of spaces before the words are cut."""

    adds: bool = False
    drops: bool = False


def _spaces(parts: Mapping[str, Any]) -> _Spaces:
    """Read the steps of a tokenizer that marks the starts of words."""
    normalizer, splitting = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    is_metaspace = splitting.get("type") == "Metaspace" and not splitting.get("split", True)
    marks, adds, drops = is_metaspace, is_metaspace and splitting.get("prepend_scheme") != "never", False
    for step in steps:
        pattern = "".join((step.get("pattern") or {}).values())
        if step["type"] == "Prepend" and step["prepend"] == _WORD_START:
            adds = True
        elif step["type"] == "Replace" and (pattern, step["content"]) == (" ", _WORD_START):
            marks = True
        elif step["type"] == "Replace" and _EXTRA_SPACES.fullmatch(pattern) and not step["content"].strip(" "):
            drops = True
        else:
            raise _unknown(f"it normalises text by a step {step['type']}, which llama.cpp does not")
    if not marks:
        raise _unknown("it does not mark the starts of words as SentencePiece does")
    return _Spaces(adds, drops)


def _additions(backend: Any, tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets the token that begins texts, and the one that ends them."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for begins in (False, True):
        for ends in (False, True):
            if whole == bos * begins + bare + eos * ends:
                return begins, ends
    raise _unknown("it adds other tokens to a text than one at the beginning and one at the end")


def _special_ids(tokenizer: Any) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    return {role: int(number) for role, number in found.items() if number is not None}


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
