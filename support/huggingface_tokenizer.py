"""Tokenizers of Hugging Face folders: tokenizer.json as a tiktoken encoding with the same ids."""

import functools
import os
import re
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import regex

from support import chat_template
from support.files import parse_json, read_user_file
from support.tokenizer import GPT2_SPLIT, BPETokenizer, valid_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# SmolLM2 splits at every digit first, so all white space before a digit is one word
SMOLLM_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}")
SMOLLM_SPLIT = SMOLLM_SPLIT.replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LONGEST_TOKEN = 1024  # bytes; checking one takes time that grows with the square of its length
GUARD = "\ud800"  # a lone surrogate, which no valid text contains


# -- files -----------------------------------------------------------------------------------------


def read_text(path):
    try:
        return read_user_file(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def read_object(path, text=None):
    """Return the dict in a JSON file, or in `text`, which was read from it."""
    raw = read_user_file(path) if text is None else valid_text(text).encode()
    value = parse_json(raw, str(path))
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


@contextmanager
def malformed(path):
    """Turn the exceptions of a file with an unexpected structure into a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is malformed ({type(error).__name__}: {error})") from None


def require(condition, message):
    if not condition:
        raise ValueError(message)


def read_tokenizer(folder, vocab_size):
    """Return {name, files, stops}: the tokenizer's files as text, and the ids that end an answer.

    Raises ValueError for an id from vocab_size on, which would have no embedding.
    """
    files = {}
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            files[name] = read_text(folder / name)
    require("tokenizer.json" in files, f"{folder} has no tokenizer.json; no other kind is read")
    name = folder.resolve().name
    path = Path(name) / "tokenizer.json"  # as Encoding calls it, so that it is parsed only once
    parsed = parse_tokenizer(files["tokenizer.json"], path)
    highest = max([*parsed.ranks.values(), *parsed.special.values()])
    require(
        highest < vocab_size,
        f"{path} has the id {highest}, but config.json has vocab_size {vocab_size}",
    )

    # two files list the ids that end an answer, a third names the token
    stops = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_object(path).get("eos_token_id") if os.path.lexists(path) else None
        if not isinstance(ids, list):
            ids = [] if ids is None else [ids]
        is_valid = all(type(i) is int and 0 <= i < vocab_size for i in ids)
        require(is_valid, f"{path} has eos_token_id = {ids!r}, which are not all token ids")
        stops += ids
    path = folder / "tokenizer_config.json"
    settings = read_object(path, files.get(path.name, "{}"))
    with malformed(path):
        eos_token = token_text(settings.get("eos_token"))
        if eos_token in parsed.special:
            stops.append(parsed.special[eos_token])
    return {"name": name, "files": files, "stops": list(dict.fromkeys(stops))}


def token_text(token):
    """Return the text of a token in tokenizer_config.json: a string, or a dict with its content."""
    return token["content"] if isinstance(token, dict) else token


# -- tokenizer.json --------------------------------------------------------------------------------


class ParsedTokenizer(NamedTuple):
    """What tokenizer.json says."""

    ranks: dict  # {bytes of a token: its id}
    special: dict  # {text of a special token: its id}
    pattern: str  # regular expression that splits text into words
    is_nfc: bool  # whether text is normalized to NFC first
    start: list  # ids before any text


@functools.lru_cache(4)
def parse_tokenizer(text, path):
    """Return the content of tokenizer.json, the text of `path`, as a ParsedTokenizer.

    Raises ValueError if tiktoken would not give the same ids.
    """
    data = read_object(path, text)
    with malformed(path):
        check_supported(data, path)
        pattern = split_pattern(data.get("pre_tokenizer") or {})
        require(
            pattern,
            f"{path} splits text into words in a way that is not implemented; those of GPT-2, "
            f"SmolLM2, Qwen and Llama 3 are",
        )
        special = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        ranks = {}
        for token, i in data["model"]["vocab"].items():
            if token not in special:
                ranks[token_bytes(token)] = i

        ids = [*ranks.values(), *special.values()]
        is_in_range = all(type(i) is int and 0 <= i < 2**24 for i in ids)
        require(
            ranks and is_in_range and len(set(ids)) == len(ids),
            f"{path} has ids that are out of range or not unique, or none",
        )
        longest = max(len(token) for token in ranks)
        require(longest <= LONGEST_TOKEN, f"{path} has a token of {longest} bytes: too long")
        check_merges(data["model"], ranks, path)
        start = template_start(data.get("post_processor") or {})
        require(set(start) <= set(ids), f"{path} puts ids before a text that are no tokens")
        return ParsedTokenizer(ranks, special, pattern, data.get("normalizer") is not None, start)


def check_supported(data, path):
    """Raise ValueError for a setting that changes ids and is not implemented."""
    model = data["model"]
    is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    require(is_bpe, f"{path} is not a byte-level BPE, the only kind that is read")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        value = model.get(name)
        require(not value, f"{path} has {name} = {value!r}, which is not implemented")
    normalizer = data.get("normalizer")
    require(normalizer in (None, {"type": "NFC"}), f"{path} has a normalizer other than NFC")

    unsupported = ["lstrip", "rstrip", "single_word"]
    if normalizer is not None:
        unsupported.append("normalized")
    for token in data.get("added_tokens") or []:
        text = token["content"]
        is_plain = not any(token.get(name) for name in unsupported)
        require(
            is_plain and isinstance(text, str) and text,
            f"{path} has the added token {text!r} with lstrip, rstrip, single_word or normalized, "
            f"or without text, which is not implemented",
        )


def split_pattern(pre_tokenizer):
    """Return the regular expression that finds the same words as a pre_tokenizer, or None."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):  # ByteLevel itself splits as GPT-2 does
        if kinds == ["ByteLevel"]:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return SMOLLM_SPLIT
        return None
    if kinds == ["Split", "ByteLevel"]:
        is_isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        for pattern in (QWEN_SPLIT, LLAMA3_SPLIT):
            if is_isolated and steps[0].get("pattern") == {"Regex": pattern}:
                return pattern
    return None


@functools.cache
def byte_of_character():
    """Return {character: byte}: tokenizer.json writes each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable}
    for n, b in enumerate(others):
        byte_of[chr(256 + n)] = b
    return byte_of


def token_bytes(token):
    byte_of = byte_of_character()
    return bytes(byte_of[character] for character in token)


def check_merges(model, ranks, path):
    """Raise ValueError unless BPE by the ids of the tokens gives what BPE by the merges gives.

    tiktoken merges the neighbours whose concatenation has the lowest id, tokenizers those that
    come first in its list of merges. The two agree on every text if the ids rise along the list
    and each listed pair is what BPE itself leaves of its token just before that merge: nothing
    merged across the token's ends, so every word that contains it gets there in the same way.
    """
    merges = []
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        require(len(pair) == 2, f"{path} has a merge of {len(pair)} tokens")
        merges.append((token_bytes(pair[0]), token_bytes(pair[1])))
    ids = [ranks[left + right] for left, right in merges]
    require(ids == sorted(ids), f"{path} has merges in another order than tiktoken's, their ids")

    listed = set(merges)
    merged = {left + right for left, right in merges}
    for token in merged:
        is_reached = last_pair(token, ranks) in listed
        require(is_reached, f"{path} has a merge into {token!r} that BPE itself would never reach")
    unmade = {token for token in ranks if len(token) > 1} - merged
    is_complete = not unmade or model.get("ignore_merges")
    require(is_complete, f"{path} has the token {min(unmade, default=b'')!r}, which no merge makes")
    has_all_bytes = all(bytes([b]) in ranks for b in range(256))
    is_known = model.get("unk_token") is None or has_all_bytes
    require(is_known, f"{path} has an unk_token, which is not implemented")


def last_pair(token, ranks):
    """Return what byte-level BPE makes of a token before its own merge; two tokens if trained."""
    parts = [token[i : i + 1] for i in range(len(token))]
    own_rank = ranks[token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, own_rank) for a, b in zip(parts, parts[1:])]
        lowest = min(pair_ranks)
        if lowest >= own_rank:
            break
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def template_start(post_processor):
    """Return the ids that the post-processor's template puts before any text."""
    ids = []
    for processor in post_processor.get("processors", [post_processor]):
        if processor.get("type") == "TemplateProcessing":
            for piece in processor["single"]:
                if "SpecialToken" not in piece:
                    break
                ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            break
    return ids


# -- the encoding ---------------------------------------------------------------------------------


class Encoding(BPETokenizer):
    """A tiktoken encoding with the ids of a Hugging Face tokenizer, and its chat template.

    state: as read_tokenizer returns it; a checkpoint keeps it. start: ids before any text;
    eot_token: ends a document, or None; stops: ids that end an answer; chat_template: Jinja, or
    None.
    """

    def __init__(self, state):
        name = state["name"]
        files = state["files"]
        parsed = parse_tokenizer(files["tokenizer.json"], Path(name) / "tokenizer.json")
        known_ids = {*parsed.ranks.values(), *parsed.special.values()}
        ends = [parsed.special.get(text) for text in ("<|endoftext|>", "<|end_of_text|>")]
        ends = [i for i in [*ends, *state["stops"]] if i in known_ids]
        eot_token = ends[0] if ends else None
        super().__init__(name, parsed.pattern, parsed.ranks, parsed.special, eot_token)

        self.state = state
        self.start = parsed.start
        self.stops = set(state["stops"])
        self.is_nfc = parsed.is_nfc
        missing = [b for b in range(256) if bytes([b]) not in parsed.ranks]
        self.missing_bytes = bytes(missing)  # SmolLM2 lacks some

        path = Path(name) / "tokenizer_config.json"
        self.settings = read_object(path, files.get(path.name, "{}"))
        template = files.get("chat_template.jinja") or self.settings.get("chat_template")
        with malformed(path):
            if isinstance(template, list):  # several of them, by name
                by_name = {entry["name"]: entry["template"] for entry in template}
                require("default" in by_name, f"{name} has chat templates, but none named default")
                template = by_name["default"]
        self.chat_template = template or None

    def encode_ordinary(self, text):
        text = valid_text(text.replace(GUARD, ""))
        if self.is_nfc:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode()
        if len(raw.translate(None, self.missing_bytes)) == len(raw):
            return super().encode_ordinary(text)
        ids = []
        for word in regex.findall(self._pat_str, text):  # missing bytes are dropped from their word
            word = word.encode().translate(None, self.missing_bytes)
            if word:
                ids += self._encode_single_piece(word)
        return ids

    def encode(self, text, *, allowed_special="all"):
        """Return the ids of text in which names of special tokens stand for them; no `start`."""
        allowed = self._special_tokens if allowed_special == "all" else allowed_special
        ids = []
        end = 0
        for match in re.finditer(any_of(allowed), text):
            ids += self.encode_ordinary(text[end : match.start()])
            ids.append(self._special_tokens[match[0]])
            end = match.end()
        return ids + self.encode_ordinary(text[end:])

    def chat(self, messages):
        """Return the ids of the folder's chat template, up to where the answer begins.

        messages: [{"role": "user", "content": "..."}, ...]. The name of a special token inside a
        message stays text, so that no message can end its turn.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.name} has no chat template: it continues text; use --prompt")
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            token = token_text(self.settings.get(f"{role}_token"))
            if isinstance(token, str):
                variables[f"{role}_token"] = token

        # break the names of special tokens in messages; encode_ordinary drops the guard again
        first_character = re.compile(f"(?=(?:{any_of(self._special_tokens)}))(.)", re.DOTALL)
        variables["messages"] = []
        for message in messages:
            content = first_character.sub(rf"\1{GUARD}", valid_text(message["content"]))
            variables["messages"].append({**message, "content": content})
        try:
            text = chat_template.render(self.chat_template, variables)
        except ValueError as error:
            raise ValueError(f"the chat template of {self.name} fails: {error}") from None
        return self.encode(text)


def any_of(words):
    """Return a regular expression for any of the words, the longest first; none never matches."""
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(re.escape(word) for word in longest_first) or "(?!)"
