"""The tokenizer of a Hugging Face folder, run by the library `tokenizers`, and its chat format."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from support import chat_template
from support.files import parse_json, read_user_file, shown
from support.tokenizer import valid_text

# The library needs over 100 bytes of memory per character and panics after 10 million blanks. So a
# long text is encoded in pieces of 10,000 to 1,000,000 characters. Each ends before a single space
# or newline between two letters, where no word is cut.
PIECES = re.compile(r".{10000,1000000}?\w(?=[ \n]\w)|.{1,1000000}", re.DOTALL)
GUARD = "\ud800"  # in `chat`, marks what is not a special token; no valid text contains it
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def require(condition, message):
    if not condition:
        raise ValueError(message)


def read_object(path, text=None):
    """Return the dict in a JSON file, or in `text` if the file has been read already."""
    raw = read_user_file(path) if text is None else valid_text(text).encode()
    value = parse_json(raw, str(path))
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


@contextmanager
def malformed(path):
    """Turn exceptions that a file with an unexpected structure causes into a ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{path} is malformed ({type(error).__name__}: {error})") from None


def check_supported(data, path):
    """Raise ValueError if a tokenizer.json is not implemented here or makes the library panic."""
    # the model must be BPE, and the last step before it must turn text into bytes
    model = data["model"]
    pre_tokenizer = data.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    is_byte_level = is_bpe and steps and steps[-1].get("type") == "ByteLevel"
    require(is_byte_level, f"{path} is not a byte-level BPE, the only kind that is read")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        value = model.get(name)
        require(not value, f"{path} has {name} = {value!r}, which is not implemented")
    normalizer = data.get("normalizer")
    require(normalizer in (None, {"type": "NFC"}), f"{path} has a normalizer other than NFC")

    # special tokens must be plain texts
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


def byte_of_character():
    """Return {character: byte}: tokenizer.json writes each byte as one printable character."""
    # printable bytes are written as themselves, the others as chr(256), chr(257), ...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable}
    for n, b in enumerate(others):
        byte_of[chr(256 + n)] = b
    return byte_of


def load_library(data, path):
    """Return the library's tokenizer for the content of tokenizer.json."""
    try:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(data))
    except ImportError:
        raise ValueError(f"{path} needs the tokenizers library: pip install tokenizers") from None
    except Exception as error:  # the library has no narrower type
        raise ValueError(f"{path} is malformed ({shown(error)})") from None


class Encoding:
    """The tokenizer of a Hugging Face folder, with its ids and its chat template.

    state: {name, files, stops}, as huggingface.read_tokenizer returns it and checkpoints have it.
    special_tokens: {text: id}. token_bytes: {id: bytes}. start: ids that come before every text.
    eot_token: the id that ends a document, or None. stops: ids that end an answer.
    roles: {"bos_token": its text, ...}. chat_template: Jinja, or None.
    """

    def __init__(self, state):
        self.state = state
        self.name = state["name"]
        files = state["files"]
        self.read_tokenizer(files["tokenizer.json"])
        self.stops = set(state["stops"])

        # a document ends with the end-of-text token, or if there is none, with a stop
        ends = [self.special_tokens.get(text) for text in ("<|endoftext|>", "<|end_of_text|>")]
        ends = [i for i in [*ends, *state["stops"]] if i in self.token_bytes]
        self.eot_token = ends[0] if ends else None

        # special tokens by role, in older folders in a file of their own, and the chat template
        path = Path(self.name) / "tokenizer_config.json"
        settings = read_object(path, files.get(path.name, "{}"))
        map_path = Path(self.name) / "special_tokens_map.json"
        special_map = read_object(map_path, files.get(map_path.name, "{}"))
        template = files.get("chat_template.jinja") or settings.get("chat_template")
        self.roles = {}
        with malformed(path):
            for role in ROLES:
                token = settings.get(role) or special_map.get(role)
                text = token["content"] if isinstance(token, dict) else token
                if isinstance(text, str):
                    self.roles[role] = text
            if isinstance(template, list):  # several templates; each has a name
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
                require(template, f"{self.name} has chat templates, but none named default")
        self.chat_template = template or None

    def read_tokenizer(self, text):
        """Set vocabulary, library tokenizer and `start` from the text of tokenizer.json."""
        path = Path(self.name) / "tokenizer.json"
        data = read_object(path, text)
        with malformed(path):
            check_supported(data, path)
            # {text: id} for the special tokens and for all others; check their ids
            model = data["model"]
            special = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
            vocab = {token: i for token, i in model["vocab"].items() if token not in special}
            ids = [*vocab.values(), *special.values()]
            is_in_range = all(type(i) is int and 0 <= i < 2**24 for i in ids)
            is_valid = vocab and is_in_range and len(set(ids)) == len(ids)
            require(is_valid, f"{path} has ids that are out of range or not unique, or none")
            byte_of = byte_of_character()
            is_known = model.get("unk_token") is None or set(byte_of) <= set(vocab)
            require(is_known, f"{path} has an unk_token, which is not implemented")

            self.special_tokens = special
            self.token_bytes = {i: text.encode() for text, i in special.items()}
            for token, i in vocab.items():
                self.token_bytes[i] = bytes(byte_of[character] for character in token)

        # remove the special tokens, so that the library finds none of them in a text
        model["vocab"] = vocab
        data.update(added_tokens=[], truncation=None, padding=None)
        self.library = load_library(data, path)
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self.special_pattern = "|".join(longest_first) or "(?!)"  # (?!) never matches

        # `start`: the mask is 1 for ids that the library adds before and after a text
        encoded = self.library.encode("a")
        n_start = [*encoded.special_tokens_mask, 0].index(0)
        self.start = encoded.ids[:n_start]
        self.n_vocab = max([*self.token_bytes, *self.start]) + 1

    def encode_ordinary(self, text):
        """Return the ids of a text. The name of a special token is encoded as text, too."""
        ids = []
        for piece in PIECES.findall(valid_text(text)):
            ids += self.library.encode(piece, add_special_tokens=False).ids
        return ids

    def decode_bytes(self, ids):
        """Return the bytes of the tokens; ids that are not in the vocabulary are skipped."""
        return b"".join(self.token_bytes.get(i, b"") for i in ids)

    def encode(self, text):
        """Return the ids of a text with special tokens. A name after a GUARD is plain text."""
        ids = []
        parts = re.split(f"(?<!{GUARD})({self.special_pattern})", text)
        for n, part in enumerate(parts):  # text and special tokens alternate
            if n % 2:
                ids.append(self.special_tokens[part])
            else:
                ids += self.encode_ordinary(part.replace(GUARD, ""))
        return ids

    def chat(self, messages):
        """Return the ids of a chat in the format of the chat template, ready for the answer.

        messages: [{"role": "user", "content": "..."}, ...]. The name of a special token inside a
        message is plain text, so that no message can pretend to end.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.name} has no chat template: it continues text; use --prompt")
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, **self.roles}
        variables["messages"] = []
        for message in messages:
            content = valid_text(message["content"])
            content = re.sub(f"(?={self.special_pattern})", GUARD, content)
            variables["messages"].append({**message, "content": content})
        try:
            text = chat_template.render(self.chat_template, variables)
        except ValueError as error:
            raise ValueError(f"the chat template of {self.name} fails: {error}") from None
        return self.encode(text)
