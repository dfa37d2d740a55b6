"""Tokenizers: bytes, a published tiktoken encoding by name, or a .tiktoken file by path."""

import base64
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken

from support.files import read_user_file

# Patterns that split a text into words, before BPE merges the bytes of each word
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# A .tiktoken file holds only the ranks of its tokens. The rest follows from its name.
# {name of the file: (number of ranks, split pattern, special tokens)}
PUBLISHED = {
    "r50k_base": (50256, GPT2_SPLIT, {"<|endoftext|>": 50256}),
    "p50k_base": (50280, GPT2_SPLIT, {"<|endoftext|>": 50256}),
    "cl100k_base": (100256, CL100K_SPLIT, CL100K_SPECIAL),
    "o200k_base": (199998, O200K_SPLIT, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
SAME_AS = {"gpt2": "r50k_base"}  # the same vocabulary; only r50k_base is published as a file

DOWNLOAD_SECONDS = 60
LONGEST_BLANK = 400_000  # longest run of white space; tiktoken panics at about a million


def valid_text(text):
    """Replace lone surrogates, which UTF-8 cannot represent, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_long_blanks(text):
    """Return text in pieces, cut inside white space too long for tiktoken. Usually [text]."""
    pieces = []
    start = 0
    for blank in re.finditer(rf"(?<!\s)\s{{{LONGEST_BLANK},}}", text):
        for end in range(blank.start() + LONGEST_BLANK, blank.end(), LONGEST_BLANK):
            pieces.append(text[start:end])
            start = end
    return [*pieces, text[start:]]


class ByteTokenizer:
    """Each byte is a token. Byte 0, which no text contains, ends a document."""

    name = "byte"
    n_vocab = 256
    eot_token = 0

    def encode_ordinary(self, text):
        return np.frombuffer(valid_text(text).encode(), np.uint8)

    def decode_bytes(self, ids):
        return bytes(ids)


class BPETokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, made safe for any vocabulary, any text and any ids.

    pat_str: the split pattern. ranks: {token as bytes: id}; BPE merges tokens of low id first.
    eot_token: the id of <|endoftext|>, which ends a document, or None if there is none.
    """

    eot_token = None  # replaces a property of the base class, which raises KeyError

    def __init__(self, name, pat_str, ranks, special_tokens):
        ids = [*ranks.values(), *special_tokens.values()]
        if not all(type(i) is int and 0 <= i < 2**24 for i in ids):
            raise ValueError(f"the tokenizer {name} has ids that are not integers from 0 to 2^24")
        if len(set(ids)) < len(ids):
            raise ValueError(f"the tokenizer {name} gives one id to two tokens")
        self.eot_token = special_tokens.get("<|endoftext|>")
        try:
            super().__init__(
                name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except ValueError:  # the regular expression does not compile
            raise ValueError(f"the tokenizer {name} has an invalid split pattern") from None

    def encode_ordinary(self, text):
        ids = []
        for piece in cut_long_blanks(text):
            ids += super().encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        """Return the bytes of the tokens; ids that are not in the vocabulary are skipped."""
        with suppress(KeyError):
            return super().decode_bytes(ids)
        pieces = []
        for i in ids:
            with suppress(KeyError):
                pieces.append(self.decode_single_token_bytes(i))
        return b"".join(pieces)


# -- by name, path or checkpoint -------------------------------------------------------------------


def get_tokenizer(name, saved=None):
    """Return the tokenizer called `name`, or if `saved` is given, that of this checkpoint.

    name: byte, a tiktoken encoding (gpt2, cl100k_base, ...), or the path of a .tiktoken file.
    """
    if saved is not None:
        return tokenizer_from_state(saved["tokenizer"])
    if name == "byte":
        return ByteTokenizer()
    if name in tiktoken.list_encoding_names():
        return published_tokenizer(name)
    if not os.path.lexists(name):
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"there is no tokenizer {name!r}; give byte, a .tiktoken file or {known}")
    return tokenizer_from_file(name)


def published_tokenizer(name):
    """Return one of tiktoken's encodings, from its cache or the network.

    tiktoken's download has no time-out, so it runs in a thread, for which we wait a minute at most.
    """
    found = []

    def fetch():
        try:
            found.append(tiktoken.get_encoding(SAME_AS.get(name, name)))
        except (OSError, ValueError):  # no network, or the checksum does not match
            pass

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not found:
        raise ValueError(
            f"the tokenizer {name} is not cached here and there is no network to fetch it; "
            f"fetch its .tiktoken file elsewhere and give the path as --tokenizer"
        )
    encoding = found[0]
    return BPETokenizer(
        encoding.name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens
    )


def tokenizer_from_file(path):
    """Return the tokenizer of a .tiktoken file. Each line is a token in base64 and its rank.

    The file does not say how to split text into words. If it is named after a published encoding,
    such as cl100k_base.tiktoken, text is split as in that one, otherwise as in GPT-2.
    """
    # read the ranks
    ranks = {}
    for number, line in enumerate(read_user_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, token_rank = line.split()
            token = base64.b64decode(token, validate=True)
            token_rank = int(token_rank)
        except ValueError:
            raise ValueError(
                f"{path} is not a .tiktoken file: line {number} is not a base64 token and its rank"
            ) from None
        if token in ranks:
            raise ValueError(f"{path}, line {number}: the token {token!r} appears twice")
        ranks[token] = token_rank
    check_bytes(ranks, path)

    # find the split pattern and the special tokens by the name of the file
    name = Path(path).stem
    name = SAME_AS.get(name, name)
    split = GPT2_SPLIT
    special = {"<|endoftext|>": max(ranks.values()) + 1}
    if name in PUBLISHED:
        n_ranks, split, special = PUBLISHED[name]
        if len(ranks) != n_ranks:
            raise ValueError(f"{path} has {len(ranks)} tokens, but {name} has {n_ranks}; rename it")
    return BPETokenizer(name, split, ranks, special)


def check_bytes(ranks, path):
    """Raise ValueError if a byte is not a token, because then some texts cannot be encoded."""
    for b in range(256):
        if bytes([b]) not in ranks:
            raise ValueError(f"{path} is not a whole .tiktoken file: no token is the byte {b}")


def tokenizer_state(tokenizer):
    """Return the tokenizer as plain data, to be saved in a checkpoint."""
    if hasattr(tokenizer, "state"):  # the tokenizer of a Hugging Face folder
        return tokenizer.state
    if isinstance(tokenizer, ByteTokenizer):
        return {"name": "byte"}
    ranks = {}
    for token, token_rank in tokenizer._mergeable_ranks.items():
        ranks[base64.b64encode(token).decode()] = token_rank
    return {
        "name": tokenizer.name,
        "pat_str": tokenizer._pat_str,
        "special_tokens": tokenizer._special_tokens,
        "ranks": ranks,
    }


def tokenizer_from_state(state):
    """Return the tokenizer for a tokenizer_state, which may come from a stranger's file."""
    try:
        if state["name"] == "byte" and len(state) == 1:
            return ByteTokenizer()
        if "files" in state:
            from support import huggingface

            return huggingface.Encoding(state)
        ranks = {}
        for token, token_rank in state["ranks"].items():
            ranks[base64.b64decode(token, validate=True)] = token_rank
        check_bytes(ranks, "the tokenizer")
        return BPETokenizer(state["name"], state["pat_str"], ranks, state["special_tokens"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's tokenizer is damaged ({error!r})") from None
