"""Reading prompts: the four forms, the errors of each, sampling, tokenising, and token texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_lens.corpus import Corpus, Prompt, read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.trace import TokenTexts
from moe_lens.trace.tokens import visible


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(corpus: Corpus) -> list[str | None]:
    return [prompt.text for prompt in corpus.prompts]


def words_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Every word is a token: ``a`` is 0, ``b`` is 1, ``user`` is 4, ``<s>`` comes first."""
    vocabulary = {word: i for i, word in enumerate(["a", "b", "c", "<s>", "user", "answer", "?"])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?", bos_token="<s>")
    tokenizer.chat_template = chat_template
    return tokenizer


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}answer{% endif %}"
)


class TestTextFile:
    def test_one_prompt_per_line(self, tmp_path: Path) -> None:
        corpus = read_corpus(write(tmp_path / "p.txt", "one\n two \nthree"))
        assert texts(corpus) == ["one", " two ", "three"]
        assert corpus.labels == () and corpus.notes == ()

    def test_blank_lines_are_counted(self, tmp_path: Path) -> None:
        corpus = read_corpus(write(tmp_path / "p.txt", "one\n\n  \ntwo\n"))
        assert texts(corpus) == ["one", "two"]
        assert corpus.notes[0].startswith("2 blank lines")

    def test_only_newlines_end_a_line(self, tmp_path: Path) -> None:
        corpus = read_corpus(write(tmp_path / "p.txt", "a\x0cb\u2028c\r\nd\n"))
        assert texts(corpus) == ["a\x0cb\u2028c", "d"]

    def test_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        assert texts(read_corpus(write(tmp_path / "p.txt", b"\xef\xbb\xbfhi"))) == ["hi"]

    @pytest.mark.parametrize("content", ["", "\n\n", "   \n"])
    def test_empty(self, tmp_path: Path, content: str) -> None:
        with pytest.raises(MoeLensError, match="one prompt per line"):
            read_corpus(write(tmp_path / "p.txt", content))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no corpus .*nothing\.txt"):
            read_corpus(tmp_path / "nothing.txt")

    def test_undecodable_names_the_line(self, tmp_path: Path) -> None:
        with pytest.raises(MoeLensError, match=r"0xe9 in line 2 .*iconv"):
            read_corpus(write(tmp_path / "p.txt", b"one\ncaf\xe9\n"))

    def test_binary(self, tmp_path: Path) -> None:
        with pytest.raises(MoeLensError, match="binary file"):
            read_corpus(write(tmp_path / "p.txt", b"\x89PNG\0\1"))

    def test_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "folder" / "loop").mkdir(parents=True)
        (tmp_path / "folder" / "loop" / "a.txt").symlink_to(tmp_path / "gone")
        with pytest.raises(MoeLensError, match="cannot be read"):
            read_corpus(tmp_path / "folder")


class TestJsonLines:
    def test_fields_and_labels(self, tmp_path: Path) -> None:
        records = [
            {"text": "t", "label": "code"},
            {"prompt": "p", "label": 3},
            {"messages": [{"role": "user", "content": "m"}]},
            {"text": None, "prompt": "q", "extra": 1},
        ]
        lines = "\n\n".join(json.dumps(record) for record in records)
        corpus = read_corpus(write(tmp_path / "p.jsonl", lines))
        assert texts(corpus) == ["t", "p", None, "q"]
        assert corpus.prompts[2].messages == ({"role": "user", "content": "m"},)
        assert [prompt.label for prompt in corpus.prompts] == ["code", "3", None, None]
        assert corpus.labels == ("3", "code")

    def test_empty_text_stays_a_prompt(self, tmp_path: Path) -> None:
        corpus = read_corpus(write(tmp_path / "p.jsonl", '{"text": ""}\n{"text": "a"}'))
        assert texts(corpus) == ["", "a"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{'text': 1}", r"Line 2 of .* is not JSON \(.*column 2\)"),
            ("[1]", "Line 2 of .* is not a JSON object"),
            ('{"body": "x"}', "none of the fields text, prompt and messages .*'body'"),
            ("{}", "found: none"),
            ('{"text": 5}', "'text' in line 2 .* is a number"),
            ('{"messages": []}', "not a list of messages"),
            ('{"messages": [{"content": "no role"}]}', "not a list of messages"),
            ('{"text": "a", "label": ["b"]}', "label in line 2 .* is a list"),
            ('{"text": "\\ud83d"}', "surrogate"),
            ("[" * 100_000, "nested too deeply"),
        ],
    )
    def test_errors_name_the_line(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "p.jsonl", '{"text": "fine"}\n' + line)
        with pytest.raises(MoeLensError, match=message):
            read_corpus(path)

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(MoeLensError, match="is empty"):
            read_corpus(write(tmp_path / "p.jsonl", "\n"))

    def test_plain_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="not JSONL"):
            read_corpus(write(tmp_path / "p.json", "[]"))


class TestFolder:
    def test_files_are_prompts_and_folders_labels(self, tmp_path: Path) -> None:
        write(tmp_path / "b" / "2.txt", "two\nlines")
        write(tmp_path / "a" / "deep" / "1.py", "one")
        write(tmp_path / "top.txt", "zero")
        write(tmp_path / ".DS_Store", b"\0\1")
        write(tmp_path / ".git" / "x", b"\0")
        corpus = read_corpus(tmp_path)
        found = [(prompt.text, prompt.label) for prompt in corpus.prompts]
        assert found == [("zero", None), ("one", "a/deep"), ("two\nlines", "b")]

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(MoeLensError, match="holds no files"):
            read_corpus(tmp_path)
        write(tmp_path / "a.txt", " \n")
        with pytest.raises(MoeLensError, match=r"all 1 files .* are empty"):
            read_corpus(tmp_path)

    def test_binary_and_jsonl_are_refused_by_name(self, tmp_path: Path) -> None:
        write(tmp_path / "one" / "a.bin", b"\0")
        write(tmp_path / "two" / "a.jsonl", "{}")
        with pytest.raises(MoeLensError, match=r"a\.bin is a binary file"):
            read_corpus(tmp_path / "one")
        with pytest.raises(UsageError, match=r"a\.jsonl is a JSONL file inside a folder"):
            read_corpus(tmp_path / "two")


def test_demo_corpora_are_labelled_and_disjoint() -> None:
    calibration, evaluation = read_corpus("demo"), read_corpus("demo:evaluation")
    assert calibration.labels == ("code", "html", "json", "math", "prose", "strings")
    assert not set(texts(calibration)) & set(texts(evaluation))


class TestSample:
    corpus = Corpus("c", tuple(Prompt(text=str(number)) for number in range(50)))

    def test_is_a_subset_in_order(self) -> None:
        drawn = [int(text or 0) for text in texts(self.corpus.sample(10, seed=3))]
        assert len(drawn) == 10 and drawn == sorted(set(drawn))

    def test_same_seed_same_prompts_on_every_machine(self) -> None:
        assert texts(self.corpus.sample(4)) == texts(self.corpus.sample(4, seed=0))
        assert texts(self.corpus.sample(4)) == ["15", "36", "44", "46"]
        assert texts(self.corpus.sample(4, seed=1)) != texts(self.corpus.sample(4))

    def test_is_nested(self) -> None:
        assert set(texts(self.corpus.sample(5))) <= set(texts(self.corpus.sample(20)))

    def test_bounds(self) -> None:
        assert self.corpus.sample(51) is self.corpus
        for size in (0, -1):
            with pytest.raises(UsageError, match="at least 1"):
                self.corpus.sample(size)


def test_fingerprint_follows_content_not_name() -> None:
    one = Corpus("one", (Prompt("a", label="x"), Prompt("b")))
    assert one.fingerprint == Corpus("two", one.prompts).fingerprint
    others = [
        (Prompt("b"), Prompt("a", label="x")),
        (Prompt("a"), Prompt("b")),
        (Prompt("a", label="x"),),
        (Prompt(None, messages=({"role": "user", "content": "a"},), label="x"), Prompt("b")),
    ]
    prints = {Corpus("one", prompts).fingerprint for prompts in others}
    assert len(prints) == 4 and one.fingerprint not in prints


class TestTokenize:
    def test_text_messages_and_empty(self) -> None:
        messages = ({"role": "user", "content": "b"},)
        corpus = Corpus("c", (Prompt("a b"), Prompt(None, messages), Prompt("")))
        assert corpus.tokenize(words_tokenizer(TEMPLATE)) == [[0, 1], [4, 1, 5], []]

    def test_chat_template_on_request(self) -> None:
        assert Corpus("c", (Prompt("a"),)).tokenize(words_tokenizer(TEMPLATE), None, True) == [
            [4, 0, 5]
        ]

    def test_an_answer_at_the_end_is_not_opened_again(self) -> None:
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        ids = Corpus("c", (Prompt(None, messages),)).tokenize(words_tokenizer(TEMPLATE))
        assert ids[0][-1] != 5

    def test_cut(self) -> None:
        assert Corpus("c", (Prompt("a b c"),)).tokenize(words_tokenizer(), 2) == [[0, 1]]
        with pytest.raises(UsageError, match="sequence length"):
            Corpus("c", (Prompt("a"),)).tokenize(words_tokenizer(), 0)

    def test_no_template(self) -> None:
        messages = ({"role": "user", "content": "b"},)
        with pytest.raises(UsageError, match="prompt 2 must go through a chat template"):
            Corpus("c", (Prompt("a"), Prompt(None, messages))).tokenize(words_tokenizer())

    def test_template_that_refuses(self) -> None:
        tokenizer = words_tokenizer("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(MoeLensError, match=r"refuses prompt 1 \(roles must alternate\)"):
            Corpus("c", (Prompt("a"),)).tokenize(tokenizer, chat_template=True)

    @pytest.mark.parametrize(("text", "added"), [("a", 1), ("<s> a", 0)])
    def test_beginning_of_sequence_comes_once(self, text: str, added: int) -> None:
        class WithBos:
            bos_token = "<s>"

            def encode(self, text: str, add_special_tokens: bool) -> list[int]:
                return [int(add_special_tokens), 7]

        assert Corpus("c", (Prompt(text),)).tokenize(WithBos()) == [[added, 7]]


class TestTokenTexts:
    @pytest.mark.parametrize(
        ("piece", "shown"),
        [
            (" def", "␣def"),
            ("    ", "␣×4"),
            ("\n   ", "↵␣␣␣"),
            ("\t\r\n", "⇥␍↵"),
            (b"\xe2\x80", "<E2><80>"),
            (b"a\xff", "a<FF>"),
            ("\u200b\x00", "<U+200B><U+0000>"),
            ("\u00a0", "<U+00A0>"),
            ("\u0301", "◌\u0301"),
            ("é你", "é你"),
            ("", ""),
        ],
    )
    def test_visible(self, piece: str | bytes, shown: str) -> None:
        assert visible(piece) == shown

    @given(st.binary(max_size=12))
    def test_nothing_stays_invisible(self, piece: bytes) -> None:
        shown = visible(piece)
        assert shown.isprintable() and " " not in shown
        assert bool(shown) == bool(piece)

    @staticmethod
    def byte_level() -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = [*alphabet, "Ġdef", "âĤ", "Ċ"]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        model = Tokenizer(models.BPE(vocabulary, []))
        model.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        return tokenizer

    def test_byte_level(self) -> None:
        tokenizer = self.byte_level()
        pieces = ["Ġdef", "âĤ", "Ċ", "Ã", "<|end|>"]
        ids = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
        shown = TokenTexts.from_tokenizer(tokenizer, [*ids, 99_999])
        assert [shown.visible(token) for token in ids] == [
            "␣def",
            "<E2><82>",
            "↵",
            "<C3>",
            "<|end|>",
        ]
        assert shown.visible(5_000) == "<id 5000>"

    def test_sentencepiece(self) -> None:
        vocabulary = {"▁def": 0, "<0x0A>": 1, "é": 2, "?": 3}
        model = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        shown = TokenTexts.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=model), range(3))
        assert [shown.visible(token) for token in range(3)] == ["␣def", "↵", "é"]

    def test_json_round_trip(self) -> None:
        texts = TokenTexts({1: b"a b", 2: b"\xe2\x80", 3: "你".encode()}, {9: "<s>"})
        assert TokenTexts.from_json(texts.to_json()) == texts
