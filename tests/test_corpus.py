"""The small models' training corpus: its checks accept what it generates, and held-out questions are not in it."""

import random
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import corpus


@pytest.fixture(scope="module")
def documents():
    return list(corpus.training_documents(seed=5, count=1500, chat=0.5))


@pytest.fixture(scope="module")
def dialogs(documents):
    return [document for document in documents if not isinstance(document, str)]


def prompts(dialog):
    """Each prefix of a conversation that ends before an answer, with the answer."""
    return [(dialog[:i], message["content"]) for i, message in enumerate(dialog) if message["role"] == "assistant"]


def test_the_same_seed_writes_the_same_corpus():
    first, again, other = (list(corpus.training_documents(seed, 50, chat=0.5)) for seed in (1, 1, 2))
    assert first == again != other


def test_stories_are_grammatical_and_coherent():
    rng = random.Random(3)
    for _ in range(200):
        story = corpus.story(rng)
        assert 6 <= len(corpus.sentences(story)) <= 12
        assert all(map(corpus.grammatical, corpus.sentences(story))), story
        assert corpus.coherent(story), story


def test_shuffled_words_are_not_grammatical():
    rng = random.Random(4)
    for sentence in corpus.sentences(" ".join(corpus.story(rng) for _ in range(50))):
        words = sentence.split()
        rng.shuffle(words)
        assert " ".join(words) == sentence or not corpus.grammatical(" ".join(words))


@pytest.mark.parametrize(
    "sentence, verdict",
    [
        ("Once upon a time, there was a little fox named Mia.", True),
        ("Once upon a time, there was a little fox named mia.", False),
        ("Once upon a time, there was a little boy named Mia.", False),
        ("Then her friend Ben the duck came by.", True),
        ("Then her friend Ben the duck came by", False),
        ('"Thank you, Ben!" said Mia.', True),
        ('"Thank you, Ben!" said Ben.', False),
    ],
)
def test_sentences_judged_by_hand(sentence, verdict):
    assert corpus.grammatical(sentence) is verdict


STORY = (
    "Once upon a time, there was a little fox named Mia. One day, Mia went for a walk by the river. "
    "There she saw a red kite. Just then, a duck named Ben came along. "
    '"That is my kite," said Ben. Mia gave the kite back to Ben. "Thank you, Mia!" said Ben. '
    "It was the best day of all."
)


def test_a_story_written_by_hand_is_coherent():
    assert corpus.coherent(STORY, K="fox", N="Mia")
    assert not corpus.coherent(STORY, K="bear")


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("One day, Mia went", "One day, Anna went"),  # another name
        ("There she saw", "There he saw"),  # another pronoun
        ("That is my kite", "That is my drum"),  # another thing
        ("back to Ben", "back to Tom"),  # another friend
        ("named Mia", "named Ben"),
        ("It was the best day of all.", "Mia was afraid of the dark."),  # another plot
        ("It was the best day of all.", "The sky is blue."),
    ],
)
def test_inconsistent_stories_are_not_coherent(right, wrong):
    assert right in STORY
    assert not corpus.coherent(STORY.replace(right, wrong))


def test_every_training_answer_is_right_and_another_one_is_wrong(dialogs):
    for dialog in dialogs:
        for prompt, answer in prompts(dialog):
            assert corpus.right(prompt, answer), (prompt, answer)
            assert not corpus.right(prompt, answer + " Fish.")
            assert not corpus.right(prompt, "")


@pytest.mark.parametrize(
    "contents, answer",
    [
        (["", "What is the opposite of hot?"], "The opposite of hot is cold."),
        (["Answer in one word.", "What is the opposite of hot?"], "Cold."),
        (["You are a pirate.", "what is 3 + 4"], "Arr! 3 + 4 = 7."),
        (["", "Count from 8 to 11."], "8, 9, 10, 11."),
        (["Your name is Mia. Say thank you after every answer.", "Who are you?"], "My name is Mia. Thank you!"),
        (["", "I am Tom.", "Nice to meet you, Tom!", "What is my name?"], "Your name is Tom."),
        (["", "What is my name?"], "You have not told me your name."),
        (["", "What colour is the sky?", "The sky is blue.", "And the grass?"], "The grass is green."),
        (["", "What is 1 + 1?", "1 + 1 = 2.", "Can you repeat that?"], "1 + 1 = 2."),
    ],
)
def test_replies_worked_out_by_hand(contents, answer):
    roles = ["system", "user", "assistant", "user"][: len(contents)]
    dialog = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True) if content]
    assert corpus.reply(dialog) == answer


def test_questions_held_out_are_in_no_training_conversation_or_document(documents, dialogs):
    for dialog in dialogs:
        for prompt, _ in prompts(dialog):
            assert not corpus.held_out(corpus.hold_out_key(prompt)), prompt
    text = "\n".join(document for document in documents if isinstance(document, str))
    asked = {line.removeprefix("Question: ") for line in text.split("\n") if line.startswith("Question: ")}
    assert asked and not any(corpus.held_out(corpus.normal(question)) for question in asked)


def test_openings_and_facts_held_out_are_in_no_training_document(documents, dialogs):
    stories = [document for document in documents if isinstance(document, str) and corpus.coherent(document)]
    stories += [answer for dialog in dialogs for _, answer in prompts(dialog) if corpus.coherent(answer)]
    openings = {corpus.sentences(story)[0] for story in stories}
    assert len(stories) > 300
    assert not openings & set(islice(corpus.story_prompts(random.Random(6)), 500))
    lines = {line for document in documents if isinstance(document, str) for line in document.split("\n")}
    for topic, prompt, completion in corpus.fact_prompts(random.Random(7)):
        assert topic == "pairs" or prompt + completion not in lines


@pytest.mark.parametrize("topic", corpus.CHAT_TOPICS)
def test_every_topic_has_held_out_questions(topic):
    rng = random.Random(8)
    for _ in range(5):
        dialog = corpus.dialog(rng, topic)
        assert dialog[-1]["role"] == "user"
        assert corpus.understand(dialog)[0] == topic
        assert corpus.held_out(corpus.hold_out_key(dialog))
