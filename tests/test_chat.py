"""Dialogs -> ids: against ids worked out by hand, and against SentencePiece and the format."""

import pytest
from sentencepiece import SentencePieceProcessor
from small import TOKENIZER

from llama.chat import encode_dialog, has_tags, render_dialog

SENTENCEPIECE = SentencePieceProcessor(model_file=str(TOKENIZER))


def turn(role, content):
    return {"role": role, "content": content}


SHORT = [turn("user", " Hi\n")]
LONG = [
    turn("system", "Be kind. "),
    turn("user", "Hello"),
    turn("assistant", " Hello. "),
    turn("user", "2 + 3?"),
]

# Worked out by hand from the bundled tokenizer's vocabulary. Of all neighbours that join to a piece, those with the
# lowest id join first: "▁Hello" by way of ll 284, ▁H 331, ell 356, ello 822, ▁Hello 823; after a newline, which is the
# byte 3 + 10 = 13, there is no ▁ and "H ello" stays. "▁kind" by way of nd 276, ▁k 406, ind 464, ▁kind 700.
SHORT_IDS = [
    1, 264, 265, 975, 331, 954, 283, 265, 975,  # <s> ▁[ INST ] ▁H i ▁[/ INST ]
]  # fmt: skip
LONG_IDS = [
    1, 264, 265, 975, 294, 293, 291, 13, 1010,  # <s> ▁[ INST ] ▁<< SYS >> <0x0A> B
    949, 700, 960, 13, 290, 979, 293, 291, 13,  # e ▁kind . <0x0A> << / SYS >> <0x0A>
    13, 991, 822, 283, 265, 975, 823, 960, 948,  # <0x0A> H ello ▁[/ INST ] ▁Hello . ▁
    2,  # </s>
    1, 264, 265, 975, 948, 996, 433, 948, 1000,  # <s> ▁[ INST ] ▁ 2 ▁+ ▁ 3
    985, 283, 265, 975,  # ? ▁[/ INST ]
]  # fmt: skip


def spell(*texts):
    """BOS text EOS BOS text ...: the format, encoded turn by turn with SentencePiece."""
    ids = []
    for i, text in enumerate(texts):
        ids += [1, *SENTENCEPIECE.encode(text)] + [2] * (i + 1 < len(texts))
    return ids


def test_ids_worked_out_by_hand(tokenizer):
    assert encode_dialog(tokenizer, SHORT) == SHORT_IDS
    assert encode_dialog(tokenizer, LONG) == LONG_IDS


def test_ids_equal_sentencepiece_and_the_format(tokenizer):
    assert encode_dialog(tokenizer, SHORT) == spell("[INST] Hi [/INST]")
    system = "<<SYS>>\nBe kind.\n<</SYS>>\n\n"
    assert encode_dialog(tokenizer, LONG) == spell(f"[INST] {system}Hello [/INST] Hello. ", "[INST] 2 + 3? [/INST]")
    assert encode_dialog(tokenizer, LONG[:2]) == spell(f"[INST] {system}Hello [/INST]")
    assert encode_dialog(tokenizer, LONG[1:]) == spell("[INST] Hello [/INST] Hello. ", "[INST] 2 + 3? [/INST]")


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["system"],
        ["assistant"],
        ["user", "user"],
        ["user", "assistant"],
        ["system", "user", "assistant"],
        ["user", "system", "user"],
        ["user", "assistant", "system"],
        ["system", "system", "user"],
        ["bot"],
    ],
)
def test_roles_out_of_order_are_named(tokenizer, roles):
    """Regression: an empty dialog, or one with only a system message, was an IndexError."""
    with pytest.raises(ValueError, match=r"has the role|is \[\]; it must be a list of messages"):
        encode_dialog(tokenizer, [turn(role, "x") for role in roles])


@pytest.mark.parametrize("dialog", [None, "Hello", ["Hello"], [{"role": "user"}], [turn("user", None)]])
def test_invalid_dialogs_are_named(tokenizer, dialog):
    with pytest.raises(ValueError, match="dialog"):
        encode_dialog(tokenizer, dialog)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", range(4))
def test_messages_with_tags_are_refused(tokenizer, tag, place):
    dialog = [dict(message) for message in LONG]
    dialog[place]["content"] += f"x{tag}x"
    assert has_tags(dialog)
    with pytest.raises(ValueError, match="may not contain the tags"):
        encode_dialog(tokenizer, dialog)
    assert not has_tags(LONG)


def test_a_dialog_is_rendered_as_it_is_encoded(tokenizer):
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Spell </s>"},
    ]
    assert render_dialog(dialog) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi! </s>\n<s>[INST] Spell </s> [/INST]"
    )
    ids = encode_dialog(tokenizer, dialog)
    assert (ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)) == (2, 1)


@pytest.mark.parametrize("role", [0, 1, 2, 3])
@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_messages_of_any_role_may_not_contain_tags(tokenizer, role, tag):
    dialog = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    dialog[role]["content"] = f"a {tag} b"
    for function in (lambda: encode_dialog(tokenizer, dialog), lambda: render_dialog(dialog)):
        with pytest.raises(ValueError, match="may not contain the tags"):
            function()
