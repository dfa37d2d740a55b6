"""Hugging Face checkpoint folders, in and out: the dense Llama, SmolLM2, Qwen2.5 and Qwen3 families.

config.json becomes the fields of train.GPTConfig, *.safetensors become tensors under train.GPT's names, each read when it is
asked for, and tokenizer.json becomes a tiktoken.Encoding with the same ids. What the GPT does not compute exactly is refused: a
ValueError with one sentence that names the file and the setting or tensor. Nothing here knows the GPT, and nothing is executed
but the folder's chat template, in Jinja's sandbox.

    python sample.py --init DIR --chat "What is the capital of France?"
    python train.py --init DIR --data my.txt --export NEW
"""
import datetime, functools, json, math, os, re, shutil, unicodedata
from contextlib import contextmanager
from pathlib import Path

import jinja2.sandbox
import regex
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD = 4 * 10 ** 9                                                  # bytes in one file of an exported folder


def read_text(path):
    try:
        return path.read_bytes().decode()
    except OSError as e:
        raise ValueError(f"cannot read {path} ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def read_json(path, text=None):
    """-> the dict in a JSON file, or in the text that was one."""
    text = read_text(path) if text is None else text
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is cut off or is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


@contextmanager
def reading(path):
    """What is not there, or of another kind than expected, means that the file is malformed."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is malformed ({type(e).__name__}: {e})") from None


# ---------------------------------------------------------------------------------------------------------------------
# config.json <-> the fields of train.GPTConfig

FAMILIES = {                                                         # what sets a family apart; the rest is common to all
    "LlamaForCausalLM": {"model_type": "llama", "qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True},
}
FIELDS = {                                                           # ours: theirs
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
    "n_hidden": "intermediate_size", "tied": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
}
MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
           "quantization_config": None, "partial_rotary_factor": 1.0}    # or absent, or null


def read_config(folder):
    """-> the fields of train.GPTConfig that the folder's config.json states."""
    path = folder / "config.json"
    with reading(path):
        return translate(read_json(path), path)


def translate(c, path):
    """The dict of a config.json -> the fields of train.GPTConfig."""
    names = c.get("architectures") or ["none"]
    if "architectures" not in c:
        raise ValueError(f"{path} names no architecture, so {path.parent} is not a Hugging Face folder; nor has it the ckpt.pt of a run")
    if names[0] not in FAMILIES:
        raise ValueError(f"{path} has the architecture {names[0]}; what can be read is {', '.join(FAMILIES)}")
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path} asks for rotary positions of the type {kind!r}, which are not implemented; only 'default' is")
    c = {**c, **{k: v for k, v in rope.items() if k == "partial_rotary_factor"}}
    for key, needed in MUST_BE.items():
        if c.get(key) not in (None, needed):
            raise ValueError(f"{path} has {key} = {json.dumps(c[key])[:60]}, which is not implemented; only {json.dumps(needed)} is")
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{path} has layer_types other than full_attention, which are not implemented")

    stated = {k: v for k, v in c.items() if v is not None}
    c = {"tie_word_embeddings": False, "num_key_value_heads": c.get("num_attention_heads"), **stated}
    c.setdefault("head_dim", 128 if names[0] == "Qwen3ForCausalLM" else 0)                   # 0: width / heads
    theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    config = {ours: c.get(theirs) for ours, theirs in FIELDS.items()} | {"rope_theta": theta, **FAMILIES[names[0]]}
    del config["model_type"]
    for ours, value in config.items():
        kind = bool if ours in ("tied", "qkv_bias", "qk_norm") else float if ours in ("rope_theta", "norm_eps") else int
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{path} has {FIELDS.get(ours, ours)} = {value!r}, which is not of type {kind.__name__}")
        config[ours] = kind(value)
    return config


def exportable(folder, config):
    """-> what config.json says, beside the dtype, of a model with these fields of train.GPTConfig; ValueError if there is no such
    family, or if `folder` is taken."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give --export a new one")
    family = next((n for n, f in FAMILIES.items() if all(config[k] == f[k] for k in ("qkv_bias", "qk_norm"))), None)
    if config["attn"] != "softmax":
        raise ValueError(f"no Hugging Face family has {config['attn']} attention, so these weights cannot be exported")
    if not family:
        raise ValueError("no Hugging Face family has both biases and QK-norm, so these weights cannot be exported")
    return {"architectures": [family], "model_type": FAMILIES[family]["model_type"], "hidden_act": "silu",
            **{theirs: config[ours] for ours, theirs in FIELDS.items()}, "rope_theta": config["rope_theta"]}


# ---------------------------------------------------------------------------------------------------------------------
# *.safetensors

def their_name(name):
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def opened(path):
    """A safetensors file; if it is cut off, the first tensor that is not there as a whole is named."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        size, where = path.stat().st_size, "in its header"
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length)) if length < size else {}
                end = {n: 8 + length + t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"}
                where = min(((stop, f"in the tensor {n}") for n, stop in end.items() if stop > size), default=(0, where))[1]
            except (ValueError, TypeError, KeyError, IndexError):
                pass
        raise ValueError(f"{path} is cut off or damaged, {where} ({str(e).splitlines()[0]})") from None


class Weights(dict):
    """{name in train.GPT: tensor} of a folder, all of it checked against `shapes` before a tensor is read. Each is read when it
    is asked for, from a mapping of its file that lives no longer than the tensor: memory holds one at a time."""
    def __init__(self, folder, shapes, tied):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
                raise ValueError(f"{index} has no weight_map from tensors to files of this folder")
            files = sorted(set(places.values()))
            for file in files:
                if not (folder / file).is_file():
                    raise ValueError(f"{folder} lacks the file {file}, which {index.name} says holds "
                                     f"{next(n for n, f in places.items() if f == file)}")
        else:
            whole = folder / "model.safetensors"
            files = [whole.name] if whole.is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
            if not files:
                raise ValueError(f"{folder} has no *.safetensors; other formats are not read")
        found = {}                                                   # their name -> path, shape
        for path in (folder / file for file in files):
            with opened(path) as f:
                for name in f.keys():
                    piece = f.get_slice(name)
                    if name in found:
                        raise ValueError(f"{path} has the tensor {name}, and {found[name][0].name} has it too")
                    if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise ValueError(f"{path}: the tensor {name} is of type {piece.get_dtype()}, not a float of 16 bits or more")
                    found[name] = path, tuple(piece.get_shape())
        for name, shape in shapes.items():
            if (theirs := their_name(name)) not in found:
                raise ValueError(f"{index if index.is_file() else folder / files[0]}: the tensor {theirs} is missing")
            path, there = found[theirs]
            if there != tuple(shape):
                raise ValueError(f"{path}: the tensor {theirs} is {there}, not {tuple(shape)} as config.json says")
            self[name] = path, theirs
        needless = {n for n in found if n.endswith("rotary_emb.inv_freq")} | ({"lm_head.weight"} if tied else set())
        strange = sorted(set(found) - set(map(their_name, shapes)) - needless)
        if strange:
            raise ValueError(f"{found[strange[0]][0]} has the tensor {strange[0]}, for which the model has no place")
        if tied and "lm_head.weight" in found:
            self["lm_head.weight"] = found["lm_head.weight"][0], "lm_head.weight"
            if not torch.equal(self["lm_head.weight"], self["embed_tokens.weight"]):
                raise ValueError(f"{found['lm_head.weight'][0]}: lm_head.weight differs from the embedding, but config.json ties them")
            del self["lm_head.weight"]

    def __getitem__(self, name):
        path, theirs = super().__getitem__(name)
        with opened(path) as f:
            return f.get_tensor(theirs)


def write(folder, config, shapes, source, tokenizer, dtype=None):
    """Write a folder that transformers loads. config: fields of train.GPTConfig; shapes: {name in train.GPT: shape};
    source(name, shape) gives a tensor, asked for one file's worth at a time; tokenizer: as a checkpoint keeps it, written if it came
    from such a folder; dtype None: that of the first tensor. The folder appears as a whole or not at all."""
    settings = exportable(folder, config)
    dtype = dtype or source(*next(iter(shapes.items()))).dtype
    settings |= {"torch_dtype": str(dtype).removeprefix("torch."), "eos_token_id": tokenizer.get("stops")}
    shards, room = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room:
            shards, room = [*shards, []], max(SHARD, size)
        shards[-1].append(name)
        room -= size
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        places = {}
        for i, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            tensors = {their_name(n): source(n, shapes[n]).to("cpu", dtype).contiguous() for n in names}
            save_file(tensors, draft / file, {"format": "pt"})
            places |= {their_name(n): file for n in names}
        if len(shards) > 1:
            total = sum(math.prod(s) for s in shapes.values()) * dtype.itemsize
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
            (draft / "model.safetensors.index.json").write_text(text)
        for name, text in tokenizer.get("files", {}).items():
            (draft / name).write_text(text, encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(settings, indent=1))
        for path in draft.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        os.replace(draft, folder)
    except BaseException as e:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(e, (OSError, SafetensorError)):
            raise ValueError(f"cannot write {folder} ({getattr(e, 'strerror', None) or e}); nothing is left of it") from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json -> tiktoken.Encoding

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first cuts out each digit. What is left ends there, so all the white space before a digit is one word.
SMOLLM = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GUARD = "\ud800"                                                     # a code point that no text can hold


def word_pattern(steps):
    """pre_tokenizer of tokenizer.json, a list of steps -> the regular expression that finds the same words, or None."""
    kinds = [s.get("type") for s in steps]
    *before, last = steps or [{}]
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        plain = {(): GPT2, (True,): SMOLLM}
        return plain.get(tuple(s.get("individual_digits") for s in before)) if set(kinds[:-1]) <= {"Digits"} else None
    if kinds == ["Split", "ByteLevel"] and before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
        return next((p for p in (QWEN, LLAMA3) if before[0].get("pattern") == {"Regex": p}), None)
    return None


def halves(token, ranks):
    """What byte-level BPE has made of a token, before its own merge: two tokens, if the vocabulary was trained."""
    parts, own = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, own) for a, b in zip(parts, parts[1:])]
        lowest = min(found)
        if lowest >= own:
            break
        i = found.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


@functools.lru_cache(4)
def parse_tokenizer(text, path):
    """tokenizer.json -> (mergeable ranks, special tokens, word pattern, whether text is put into NFC, ids before any text).

    tiktoken merges the neighbours whose concatenation has the lowest id, tokenizers those that come first in its list of merges.
    The two agree on every text if the ids rise along the list and each listed pair is what BPE itself has left of its token
    just before that merge: nothing merged across the token's ends, so it has gone in any word as it goes alone."""
    def need(ok, what):
        if not ok:
            raise ValueError(f"{path} {what}")
    data = read_json(path, text)
    with reading(path):
        model, added = data["model"], data.get("added_tokens") or []
        need(model.get("type", "BPE") == "BPE" and not model.get("byte_fallback"), "is not a byte-level BPE, the only kind that is read")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            need(not model.get(key), f"has {key} = {model.get(key)!r}, which is not implemented")
        steps = data.get("pre_tokenizer") or {}
        pattern = word_pattern(steps.get("pretokenizers", [steps]))
        need(pattern, "splits text into words in a way that is not implemented; those of GPT-2, SmolLM2, Qwen and Llama 3 are")
        normalizer = data.get("normalizer")
        need(normalizer in (None, {"type": "NFC"}), "has a normalizer other than NFC")
        for t in added:
            need(not (t.get("lstrip") or t.get("rstrip") or t.get("single_word") or t.get("normalized") and normalizer),
                 f"has the added token {t['content']!r} with lstrip, rstrip, single_word or normalized, which are not implemented")
        special = {t["content"]: t["id"] for t in added}

        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]                    # GPT-2 shows a byte as one of these
        shown = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(printable)))}
        raw = lambda token: bytes(shown[c] for c in token)
        ids = {raw(t): i for t, i in model["vocab"].items() if t not in special}
        merges = [tuple(map(raw, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
        results = [ids[a + b] for a, b in merges]
        need(results == sorted(results), "has merges in another order than their ids, which tiktoken goes by")
        listed = set(merges)
        made = {a + b for a, b in merges}
        for token in made:
            need(halves(token, ids) in listed, f"has a merge into {token!r} that BPE itself would never reach")
        rest = {t for t in ids if len(t) > 1} - made
        need(not rest or model.get("ignore_merges"), f"has the token {min(rest, default=b'')!r}, which no merge makes")
        need(model.get("unk_token") is None or all(bytes([b]) in ids for b in range(256)), "has an unk_token, which is not implemented")
        every = [*ids.values(), *special.values()]
        need(ids and all(type(i) is int and 0 <= i < 2 ** 24 for i in every) and len(set(every)) == len(every),
             "has ids that are out of range or not unique, or none")

        processor = data.get("post_processor") or {}
        template = next((p for p in processor.get("processors", [processor]) if p.get("type") == "TemplateProcessing"), {"single": []})
        start = []
        for piece in template["single"]:
            if "SpecialToken" not in piece:
                break
            start += template["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        return ids, special, pattern, normalizer is not None, start


class Encoding(tiktoken.Encoding):
    """tiktoken.Encoding with the ids of a Hugging Face tokenizer, and what else its folder says about text: `start`, the ids
    before any text; `eot_token`, which ends a document; `stops`, which end an answer; `chat`."""
    eot_token = None                                                 # the property of the base class knows <|endoftext|> only

    def __init__(self, saved):
        """saved: as read_tokenizer gives it; a checkpoint keeps it."""
        self.saved, files = saved, saved["files"]
        path = Path(saved["name"]) / "tokenizer.json"
        ranks, special, pattern, self.nfc, self.start = parse_tokenizer(files["tokenizer.json"], path)
        super().__init__(saved["name"], pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.absent = bytes(b for b in range(256) if bytes([b]) not in ranks)                # SmolLM2 has no token for some
        self.stops = set(saved["stops"])
        ends = [special[t] for t in ("<|endoftext|>", "<|end_of_text|>") if t in special] + saved["stops"]
        if not ends:
            raise ValueError(f"{path} has no token that ends a document, and config.json names none")
        self.eot_token = ends[0]

    def encode_ordinary(self, text):
        text = text.replace(GUARD, "")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        data = text.encode(errors="replace")
        if len(data.translate(None, self.absent)) == len(data):
            return super().encode_ordinary(text)
        words = (w.encode(errors="replace").translate(None, self.absent) for w in regex.findall(self._pat_str, text))
        return [i for w in words if w for i in self._encode_single_piece(w)]                 # as tokenizers: dropped from their word

    def encode(self, text, *, allowed_special="all"):
        """Ids of text in which the names of special tokens stand for them, as Hugging Face reads text; but no `start`."""
        allowed = self._special_tokens if allowed_special == "all" else allowed_special
        ids, end = [], 0
        for m in re.finditer("|".join(map(re.escape, sorted(allowed, key=len, reverse=True))) or "(?!)", text):
            ids += [*self.encode_ordinary(text[end:m.start()]), self._special_tokens[m[0]]]
            end = m.end()
        return ids + self.encode_ordinary(text[end:])

    @property
    def chat_template(self):
        """The folder's chat template, None if there is none."""
        files = self.saved["files"]
        template = files.get("chat_template.jinja") or json.loads(files.get("tokenizer_config.json", "{}")).get("chat_template")
        if isinstance(template, list):                               # several of them, by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return template

    def chat(self, messages):
        """[{"role": "user", "content": "..."}, ...] -> ids of the folder's chat template, up to where the answer begins. The
        name of a special token inside a message is text there, not the token: nobody but the template ends a turn."""
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        settings, template = json.loads(self.saved["files"].get("tokenizer_config.json", "{}")), self.chat_template
        if not template:
            raise ValueError(f"{self.name} has no chat template: it is a model of plain text, to be used with --prompt")
        words = {k: v["content"] if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token") and v}
        special = "|".join(map(re.escape, self._special_tokens)) or "(?!)"
        hide = lambda text: re.sub(f"(?=(?:{special}))(.)", rf"\1{GUARD}", text, flags=re.S)

        def refuse(message):
            raise jinja2.TemplateError(message)
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            return self.encode(env.from_string(template).render(
                messages=[{**m, "content": hide(m["content"])} for m in messages], add_generation_prompt=True, **words))
        except jinja2.TemplateError as e:
            raise ValueError(f"the chat template of {self.name} does not work ({e})") from None


def read_tokenizer(folder, vocab_size):
    """-> {name, files, stops}: the text of the tokenizer's files and the ids that end an answer, all that Encoding needs. Ids from
    vocab_size on would have no embedding."""
    files = {n: read_text(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()}
    if "tokenizer.json" not in files:
        raise ValueError(f"{folder} has no tokenizer.json; other tokenizers are not read")
    name = folder.resolve().name
    ids, special, *_ = parse_tokenizer(files["tokenizer.json"], Path(name) / "tokenizer.json")
    highest = max([*ids.values(), *special.values()])
    if highest >= vocab_size:
        raise ValueError(f"{folder / 'tokenizer.json'} has the id {highest}, but config.json has vocab_size = {vocab_size}")
    stops = []
    for file in ("generation_config.json", "config.json"):
        found = (read_json(folder / file) if (folder / file).is_file() else {}).get("eos_token_id")
        stops += found if isinstance(found, list) else [found] if found is not None else []
    settings = folder / "tokenizer_config.json"
    with reading(settings):
        word = read_json(settings, files.get(settings.name, "{}")).get("eos_token")
        word = word["content"] if isinstance(word, dict) else word
        stops += [special[word]] if word in special else []
    if not all(type(i) is int for i in stops):
        raise ValueError(f"{folder} has eos_token_id = {stops}, which are not token ids")
    return {"name": name, "files": files, "stops": list(dict.fromkeys(stops))}
