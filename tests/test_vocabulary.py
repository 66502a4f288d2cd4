"""Tokenizers of every file format, compared with the packages for which these files are written."""

import base64
import itertools
import json
import random
import re
import threading

import pytest
import tiktoken
import tokenizers
from small import MODELS, TOKENIZER, cases

from llama import Llama, Tokenizer
from llama.checkpoint.convert import convert, files_of
from llama.checkpoint.hf_tokenizer import tokenizer_files
from llama.checkpoint.tokenizer_write import byte_pair_files, merges, ranks_file
from llama.pre_tokenizer import LLAMA3_PATTERN, unicode_to_bytes
from llama.tokenizer import Decoder
from llama.vocabulary import LLAMA3_SPECIAL, parts

TEXT = (
    "Once upon a time there was a little cat who said: don't, DON'T! It's 1234567 o'clock.\n\n\tdef f(x):\r\n"
    "    return x + 3\n naïve café, Straße, 你好世界, 🦙🙂, résumé  two   spaces "
)
LETTERS = [
    *"abcdehinorstuv EIT0123456789'.,!?-_<|>\n\t\r\u00a0\u3000éß你好🙂\u0301\ufffd",
    "  ",
    "'s",
    "'LL",
    "\r\n",
    "<s>",
]
LETTERS += ["<|eot_id|>", "</s>", "▁", "the", " the", "ing", "\U0001f9d1\u200d\U0001f4bb"]


def train_ranks(size=400):
    """Byte-level BPE: the most frequent pair in the text is merged next."""
    import regex

    ranks = {bytes([i]): i for i in random.Random(1).sample(range(256), 256)}
    ranks = {token: i for i, token in enumerate(ranks)}
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(LLAMA3_PATTERN, TEXT * 3)]
    while len(ranks) < 256 + size:
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=counts.get)
        ranks[best[0] + best[1]] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


RANKS = train_ranks()


def write_ranks(folder):
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in RANKS.items()))
    return path


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return Tokenizer(write_ranks(tmp_path_factory.mktemp("ranks")))


def texts(count, seed=0):
    chance = random.Random(seed)
    for _ in range(count):
        yield "".join(chance.choices(LETTERS, k=chance.randrange(25)))


def pieces_join(tokenizer, ids):
    """Decode ids: as a whole, piece by piece, and after any prefix."""
    whole = tokenizer.decode(ids)
    assert "".join(tokenizer.decode_pieces(ids)) == whole
    cut = len(ids) // 2
    decoder = Decoder(tokenizer)
    before = "".join(map(decoder.push, ids[:cut])) + (decoder.flush() if cut == len(ids) else "")
    assert before + "".join(tokenizer.decode_pieces(ids[cut:], ids[:cut])) == whole
    return whole


def test_ranks_are_encoded_as_tiktoken_does(llama3):
    special = {name: len(RANKS) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    theirs = tiktoken.Encoding("test", pat_str=LLAMA3_PATTERN, mergeable_ranks=RANKS, special_tokens=special)
    for text in texts(cases(20_000)):
        ids = llama3.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text, disallowed_special=())
        assert pieces_join(llama3, ids) == text
    chance = random.Random(2)
    for _ in range(cases(2000)):  # ids without text
        ids = chance.choices(range(len(RANKS)), k=6)
        assert pieces_join(llama3, ids) == theirs.decode_bytes(ids).decode("utf-8", "replace")


def test_special_tokens_of_llama_3(llama3):
    first = len(RANKS)
    assert llama3.n_words == first + 256
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (first, first + 1, -1)
    assert llama3.eos_ids == {first + 1, first + 8, first + 9}
    names = {2: "reserved_special_token_0", 4: "finetune_right_pad_id", 5: "reserved_special_token_2"}
    names |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    names |= {11: "reserved_special_token_3", 255: "reserved_special_token_247"}
    for id, name in names.items():
        assert llama3.special[f"<|{name}|>"] == first + id
    assert llama3.encode("x", bos=True, eos=True) == [first, *llama3.encode("x", False, False), first + 1]
    for name in ("<|begin_of_text|>", "<|eot_id|>"):
        ids = llama3.encode(name, bos=False, eos=False)
        assert max(ids) < first and llama3.decode(ids) == name
        assert llama3.decode([llama3.special[name]]) == ""


@pytest.mark.parametrize("run", [" ", "x", "\n", "é", "x y"])
def test_very_long_runs(llama3, run):
    text = run * (1_000_000 // len(run))
    assert "".join(parts(text)) == text
    ids = llama3.encode(text, bos=False, eos=False)
    assert llama3.decode(ids) == text


def test_long_texts_are_split_as_by_meta():
    def slow(text):
        found, run, white, begin = [], 0, None, 0
        for i, character in enumerate(text):
            if character.isspace() == white:
                run += 1
                if run > 25_000:
                    found.append(text[begin:i])
                    begin, run = i, 1
            else:
                run, white = 1, character.isspace()
        return [*found, text[begin:]]

    for text in ("a" * 60_000 + " " * 25_000 + "b" * 25_001, "ab " * 30_000, "", " " * 50_000 + "x", "\u3000" * 30_000):
        assert [*parts(text)] == (slow(text) if text else [])


def test_tokenizer_json_of_llama_3(llama3, tmp_path):
    """Written, and read without and with the package tokenizers. The merges equal those of transformers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    files = byte_pair_files(llama3.vocabulary)
    (tmp_path / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    assert {chr(ord(c)): b for b, c in bytes_to_unicode().items()} == unicode_to_bytes()
    ours, theirs = (
        Tokenizer(tmp_path / "tokenizer.json"),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert type(ours.vocabulary) is type(llama3.vocabulary)
    assert (ours.n_words, ours.bos_id, ours.eos_ids, ours.special) == (
        *(llama3.n_words, llama3.bos_id, llama3.eos_ids),
        llama3.special,
    )
    theirs.encode_special_tokens = True
    for text in texts(cases(20_000), seed=3):
        ids = ours.encode(text, bos=False, eos=False)
        assert ids == llama3.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert all(left + right in RANKS for left, right in merges(llama3.vocabulary))
    again = Tokenizer(write_bytes(tmp_path / "tokenizer.model", ranks_file(ours.vocabulary)))
    assert again.vocabulary.ranks == RANKS


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def gpt2_json():
    """Byte-level BPE with GPT-2's pre-tokenizer, and ids that are not ranks."""
    model = tokenizers.models.BPE()
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_tokens(["<|im_start|>"])
    return json.loads(made.to_str())


def llama2_json(**changes):
    return {**tokenizer_files(Tokenizer(TOKENIZER).sp_model)["tokenizer.json"], **changes}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
JSON = {
    "Llama 2": llama2_json,
    "Llama 2 by transformers 5": lambda: llama2_json(normalizer=None, pre_tokenizer=METASPACE),
    "GPT-2": gpt2_json,
}


@pytest.mark.parametrize("kind", JSON)
def test_tokenizer_json_of_other_kinds(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(JSON[kind]()))
    ours, theirs = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    assert ours.n_words == theirs.get_vocab_size()
    for text in texts(cases(20_000), seed=4):
        ids = ours.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert pieces_join(ours, ids) == theirs.decode(ids, skip_special_tokens=True)
    if kind == "Llama 2":
        slow = Tokenizer(TOKENIZER)
        assert (ours.bos_id, ours.eos_id) == (slow.bos_id, slow.eos_id)
        assert all(ours.encode(t, True, True) == slow.encode(t, True, True) for t in texts(cases(2000), seed=5))


def test_without_the_package_the_error_names_it(tmp_path, monkeypatch):
    import sys

    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2_json()))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="needs the package tokenizers: pip install tokenizers"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_with_tokenizer_json_alone_generates_and_converts(tmp_path):
    from transformers import AutoTokenizer

    convert(MODELS / "small-chat", tmp_path / "hf", "hf", 1, None)
    llama = Llama.build(MODELS / "small-chat", max_seq_len=64, device="cpu", dtype="float32")
    expected = llama.text_completion(["Once upon a time"], temperature=0, max_gen_len=12)
    (tmp_path / "hf" / "tokenizer.model").unlink()
    again = Llama.build(tmp_path / "hf", max_seq_len=64, device="cpu", dtype="float32")
    assert again.text_completion(["Once upon a time"], temperature=0, max_gen_len=12) == expected
    convert(tmp_path / "hf", tmp_path / "back", "hf", 1, None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs("Once upon")["input_ids"] == again.tokenizer.encode("Once upon", bos=True, eos=False)


def test_a_tokenizer_of_llama_3s_form_without_bos(tmp_path):
    """Regression: the converted one added BOS, as tokenizer_config.json was not read."""
    from transformers import AutoTokenizer

    path = write_ranks(tmp_path)
    own = Tokenizer(path)
    own.vocabulary.adds_bos = False
    for name, content in files_of(own, path, tmp_path, "hf").items():
        (tmp_path / name).write_text(json.dumps(content))
    ids = AutoTokenizer.from_pretrained(tmp_path)("Once upon")["input_ids"]
    assert ids == own.encode("Once upon", bos=True, eos=False)
    assert ids == Tokenizer(tmp_path / "tokenizer.json").encode("Once upon", bos=True, eos=False)


def test_added_tokens_are_in_tokenizer_json_alone(tmp_path):
    """A fine-tune's added tokens are not in its tokenizer.model of Llama 2."""
    from safetensors.torch import load_file, save_file
    from torch import cat, ones

    convert(MODELS / "small-chat", tmp_path / "hf", "hf", 1, None)
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1024, "content": "<|im_end|>"})
    path.write_text(json.dumps(content))
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<|im_end|>": 1024}')
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = cat((weights[name], ones(1, weights[name].shape[1], dtype=weights[name].dtype)))
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": 1025, "eos_token_id": [2, 1024]}))
    llama = Llama.build(tmp_path / "hf", max_seq_len=64, device="cpu", dtype="float32")
    assert llama.tokenizer.n_words == llama.model.vocab_size == 1025
    assert llama.tokenizer.special["<|im_end|>"] == 1024 and llama.tokenizer.eos_ids == {2, 1024}


def llama3_json(llama3, **changes):
    return {**byte_pair_files(llama3.vocabulary)["tokenizer.json"], **changes}


def write_json(folder, content, name="tokenizer.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_threads_that_encode_texts_and_templates_at_once(tmp_path):
    ours = Tokenizer(write_json(tmp_path, llama2_json()))
    text, found = "once upon a time </s> " * 50, []

    def plain():
        for _ in range(60):
            found.append(2 in ours.encode(text, bos=False, eos=False))

    def template():
        for _ in range(60):
            ours.encode_special("<s>" + text)

    threads = [threading.Thread(target=work) for work in (plain, template) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(found)


def test_truncation_and_padding_are_ignored(tmp_path):
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    content = llama2_json(truncation=cut, padding={**pad, "pad_token": "<unk>"})
    ours, slow = Tokenizer(write_json(tmp_path, content)), Tokenizer(TOKENIZER)
    for text in ("Once", TEXT):
        assert ours.encode(text, bos=False, eos=False) == slow.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("change", ["a token that is not special", "a normalizer", "a prefix space"])
def test_variants_of_llama_3s_tokenizer_use_tokenizers(llama3, tmp_path, change):
    content = llama3_json(llama3)
    if change == "a token that is not special":
        content["added_tokens"][20] |= {"content": "<tool_call>", "special": False}
    elif change == "a normalizer":
        content["normalizer"] = {"type": "Lowercase"}
    else:
        content["pre_tokenizer"]["pretokenizers"][1] = {**content["decoder"], "add_prefix_space": True}
    ours = Tokenizer(path := write_json(tmp_path, content))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert ours.n_words == theirs.get_vocab_size() == llama3.n_words
    for text in ("<tool_call>x", "Hello World", "the <|eot_id|>"):
        theirs.encode_special_tokens = True
        assert ours.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False).ids
    if change == "a token that is not special":
        assert ours.decode(ours.encode("the <tool_call>x", False, False)) == "the <tool_call>x"


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["model"]["vocab"].update(the="5"),
        lambda c: c["added_tokens"][3].update(id="x"),
        lambda c: c["added_tokens"][3].pop("content"),
        lambda c: c.update(added_tokens=7),
        lambda c: c["model"].update(vocab=None),
    ],
)
def test_a_damaged_tokenizer_json_is_named(llama3, tmp_path, damage):
    content = llama3_json(llama3)
    damage(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        Tokenizer(write_json(tmp_path, content))


def test_ids_that_a_tokenizer_json_leaves_out(tmp_path):
    """Regression: an added token had the id in the file, and text that spells it another one."""
    content = llama2_json()
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1030, "content": "<|end|>"})
    ours, theirs = Tokenizer(write_json(tmp_path, content)), tokenizers.Tokenizer.from_str(json.dumps(content))
    assert ours.special["<|end|>"] == theirs.token_to_id("<|end|>") == ours.n_words - 1
    assert ours.encode_special("<|end|>") == [ours.special["<|end|>"]]


@pytest.mark.parametrize("content", [[], "x", {"bos_token": 5}, {"eos_token": {"content": 5}}, {"bos_token": ["<s>"]}])
def test_special_tokens_map_beside_tokenizer_json(tmp_path, content):
    write_json(tmp_path, llama2_json())
    path = write_json(tmp_path, content, "special_tokens_map.json")
    if isinstance(content, dict):
        assert (Tokenizer(tmp_path / "tokenizer.json").bos_id, Tokenizer(tmp_path / "tokenizer.json").eos_id) == (1, 2)
    else:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Tokenizer(tmp_path / "tokenizer.json")


def test_special_tokens_of_a_fine_tune_survive_conversion(llama3, tmp_path):
    """tokenizer.model cannot store their names and end-of-turn ids."""
    from test_llama3 import save

    content = llama3_json(llama3)
    content["added_tokens"][2]["content"] = "<|im_start|>"
    save(tmp_path / "from", vocab_size=llama3.n_words + 7)
    write_json(tmp_path / "from", content)
    ends = [llama3.eos_id, llama3.bos_id + 3]
    write_json(tmp_path / "from", {"eos_token_id": ends}, "generation_config.json")
    write_json(
        tmp_path / "from", {"eos_token": "<|eot_id|>", "chat_template": "{{ eos_token }}x"}, "tokenizer_config.json"
    )
    first = Llama.build(tmp_path / "from", max_seq_len=32, device="cpu")
    assert first.chat_format.render([{"role": "user", "content": "x"}]) == "<|eot_id|>x"
    for to in ("meta", "hf"):
        convert(tmp_path / "from", tmp_path / to, to, 1, None)
        again = Llama.build(tmp_path / to, max_seq_len=32, device="cpu")
        assert again.tokenizer.special == first.tokenizer.special
        assert again.tokenizer.eos_ids == first.tokenizer.eos_ids >= {*ends}
        assert again.model.vocab_size == llama3.n_words
        assert again.chat_format.name == "template"
