"""The model against Hugging Face's Llama with the same random weights, and against itself when called in other ways."""

import pytest
import torch
from small import GQA, PUBLISHED, ROOT, SHAPES, hugging_face, random_model, relative_error, save_random

from llama import Llama, ModelArgs, Transformer
from llama.batch import Batch, Span, check, groups

TOKENS = torch.tensor([[5, 17, 99, 3, 64, 64, 127, 0, 1, 2, 30, 31], [7, 7, 7, 8, 9, 100, 101, 102, 103, 104, 105, 6]])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_face(shape):
    model = random_model(SHAPES[shape])
    theirs = hugging_face(model.params, model.state_dict())(TOKENS).logits
    assert relative_error(model(TOKENS, 0), theirs) <= 1e-5


def test_logits_at_the_end_of_a_long_context_equal_hugging_face():
    """RoPE angles grow with the position, and so do errors of the frequencies: theta ** -x instead of 1 / theta ** x,
    which rounds differently, caused an error of 4e-5."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 128, (1, 4096))
    model = random_model({**GQA, "n_heads": 2, "n_kv_heads": 1, "dim": 256, "n_layers": 2}, max_seq_len=4096)
    theirs = hugging_face(model.params, model.state_dict())
    with torch.inference_mode():
        ours = model.hidden(Batch.of([(0, 0, tokens[0].tolist())]))[-200:]
        theirs = theirs.model(tokens, output_hidden_states=True)
        assert relative_error(model.norm(ours), theirs.last_hidden_state[0, -200:]) <= 1e-5


def _logits_of_checkpoint(folder, tokens):
    llama = Llama.build(folder, max_seq_len=32, device="cpu", dtype="float32")
    with torch.inference_mode():
        return llama.model(tokens, 0).clone()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shape", ["MHA", "GQA", "odd FFN"])
def test_logits_on_several_ranks_equal_hugging_face(shape, world_size, ranks, tmp_path, tokenizer):
    shape = SHAPES[shape]
    state = save_random(tmp_path, shape, mp=world_size)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    args = ModelArgs(**shape, vocab_size=tokenizer.n_words)
    theirs = hugging_face(args, state)(TOKENS).logits
    for ours in ranks(world_size).run(_logits_of_checkpoint, tmp_path, TOKENS):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [3, 1, 4, 1, 3], [11, 1]])
def test_any_division_into_chunks_gives_the_same_logits(chunks):
    """Regression: a chunk of several tokens after the first had a wrong mask. Decode steps are chunks of one."""
    model = random_model()
    whole = model(TOKENS, 0)
    begin, parts = 0, []
    for chunk in chunks:
        parts.append(model(TOKENS[:, begin : begin + chunk], begin))
        begin += chunk
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-5


def test_rows_at_their_own_positions():
    """One start for each row: its logits are those that it has alone, for each type of `start_pos`."""
    model = random_model()
    whole = model(TOKENS, 0)
    model.allocate_cache()
    model(TOKENS[:, :9], 0)  # from here on the second row's cache is stale beyond position 4
    for starts in ([9, 4], torch.tensor([9, 4])):
        step = model(torch.stack([TOKENS[0, 9:12], TOKENS[1, 4:7]]), starts)
        assert relative_error(step, torch.stack([whole[0, 9:12], whole[1, 4:7]])) <= 1e-5


@pytest.mark.parametrize("lengths", [[12], [12, 12], [5, 12, 12, 1], [1, 1, 7]], ids=str)
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 0, 1, 2]], ids=str)
def test_packed_sequences_equal_each_alone(lengths, start, slots):
    """Both logits and cache, for any sequences in a batch and any slots."""
    model = random_model()
    torch.manual_seed(0)
    slots = slots[: len(lengths)]
    tokens = torch.randint(0, 128, (len(lengths), 15)).tolist()
    new = [row[start : start + length] for row, length in zip(tokens, lengths, strict=True)]
    alone, cached = [], []
    for row, ids in zip(tokens, new, strict=True):
        if start:
            model.hidden(Batch.of([(0, 0, row[:start])]))
        alone.append(model.hidden(Batch.of([(0, start, ids)])))
        cached.append([cache[0, :, : start + len(ids)].clone() for cache in model.buffers()])
    model.allocate_cache()
    if start:
        model.hidden(Batch.of((slot, 0, row[:start]) for slot, row in zip(slots, tokens, strict=True)))
    packed = model.hidden(Batch.of((slot, start, ids) for slot, ids in zip(slots, new, strict=True)))
    assert relative_error(packed, torch.cat(alone)) <= 1e-5
    for slot, length, theirs in zip(slots, lengths, cached, strict=True):
        for cache, their in zip(model.buffers(), theirs, strict=True):
            assert relative_error(cache[slot, :, : start + length], their) <= 1e-5


def test_packed_sequences_begin_at_different_positions():
    model = random_model()
    whole = model(TOKENS, 0)
    model.allocate_cache()
    model(TOKENS[:, :9], 0)
    step = model.logits(model.hidden(Batch.of([(0, 9, TOKENS[0, 9:12].tolist()), (1, 4, TOKENS[1, 4:9].tolist())])))
    assert relative_error(step, torch.cat([whole[0, 9:12], whole[1, 4:9]])) <= 1e-5


def test_a_packed_batch_worked_out_by_hand():
    batch = Batch.of([(0, 5, [17]), (3, 0, [1, 400, 401])])
    assert batch.tokens.tolist() == [17, 1, 400, 401]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.slots.tolist() == [0, 3, 3, 3]
    assert batch.sequences == (Span(0, 5, 1), Span(3, 0, 3))
    tokens, slots, T, S, mask = groups(batch)[0]
    assert (tokens, slots, T, S, mask) == (slice(0, 1), slice(0, 1), 1, 6, None)
    alike = groups(Batch.of([(1, 2, [5, 6]), (2, 2, [7, 8]), (0, 2, [9, 9])]))
    assert [(group.tokens, group.slots) for group in alike] == [
        (slice(0, 4), slice(1, 3)),
        (slice(4, 6), slice(0, 1)),
    ]
    assert alike[0].mask.tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([Span(slot, 0, 1) for slot in range(5)], "batch of 5 exceeds max_batch_size 4"),
        ([Span(0, 3, 1), Span(1, 3, 62)], "position 65 exceeds max_seq_len 64"),
        ([Span(0, 0, 1), Span(1, 0, 0)], "0 tokens"),
        ([Span(0, -1, 1)], "start_pos -1"),
    ],
)
def test_packed_sequences_that_do_not_fit(sequences, message):
    with pytest.raises(ValueError, match=message):
        check(sequences, random_model().params)


def test_right_padding_is_never_attended_to():
    model = random_model()
    alone = model(TOKENS[:1, :5], 0)
    padded = TOKENS[:1].clone()
    padded[:, 5:] = 0
    assert relative_error(model(padded, 0)[:, :5], alone) <= 1e-5


def test_without_a_cache_the_logits_are_the_same_and_have_gradients():
    cached = random_model()
    model = Transformer(ModelArgs(**GQA, vocab_size=128, max_batch_size=0))
    model.load_state_dict(cached.state_dict())
    logits = model(TOKENS, 0)
    assert relative_error(logits.detach(), cached(TOKENS, 0)) <= 1e-6
    logits.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    with pytest.raises(ValueError, match="without a cache"):
        model(TOKENS, 3)


def test_the_cache_keeps_no_gradients():
    """Outside of inference mode, a cache that keeps the autograd graph would grow with every call."""
    model = random_model().requires_grad_(True)
    for start in range(3):
        model(TOKENS[:, start : start + 1], start)
    assert not model.layers[0].attention.cache.kv.requires_grad


def test_arguments_keep_their_order():
    """Callers of the public implementation pass them by position."""
    args = ModelArgs(64, 3, 8, 4, 128, 32, None, 1e-5, 2, 16)
    assert (args.max_batch_size, args.max_seq_len, args.rope_theta) == (2, 16, 10000.0)


def test_logits_of_chosen_positions():
    model = random_model()
    hidden = model.hidden(Batch.rows(TOKENS, 0, model.params))
    assert torch.allclose(model.logits(hidden[[11, 23]]), model(TOKENS, 0)[:, -1], atol=1e-5)


def test_computes_in_the_dtype_of_its_weights_and_answers_in_float32():
    model = random_model().bfloat16()
    exact = random_model()(TOKENS, 0)
    logits = model(TOKENS, 0)
    assert logits.dtype == torch.float32
    assert model.layers[0].attention.cache.kv.dtype == torch.bfloat16
    assert 1e-4 < relative_error(logits, exact) < 0.1


@pytest.mark.parametrize(
    ("tokens", "start", "message"),
    [
        (torch.zeros(5, 1, dtype=torch.long), 0, "batch of 5 exceeds max_batch_size 4"),
        (torch.zeros(1, 65, dtype=torch.long), 0, "position 65 exceeds max_seq_len 64"),
        (torch.zeros(2, 1, dtype=torch.long), [3, 64], "position 65 exceeds max_seq_len 64"),
        (torch.zeros(2, 1, dtype=torch.long), [1, 2, 3], "3 values for a batch of 2"),
        (torch.zeros(1, 1, dtype=torch.long), -1, "start_pos -1"),
        (torch.zeros(1, 0, dtype=torch.long), 0, "0 tokens"),
        (torch.zeros(3, dtype=torch.long), 0, r"of shape \(3,\), not ids"),
        (torch.zeros(1, 2), 0, "tokens are torch.float32"),
        (torch.zeros(1, 2, dtype=torch.long), 1.5, "start_pos is 1.5"),
        (torch.zeros(1, 2, dtype=torch.long), [], r"start_pos is \[\]"),
    ],
)
def test_too_large_batches_and_positions_are_named(tokens, start, message):
    """Regression: bare asserts such as `AssertionError: (6, 4)`."""
    with pytest.raises(ValueError, match=message):
        random_model()(tokens, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads 8 is not divisible by n_kv_heads 3"),
        ({"n_heads": 7}, "dim 64 cannot be divided into n_heads 7"),
        ({"ffn_dim_multiplier": 1e-9}, "ffn_dim_multiplier 1e-09 gives the feed-forward layer no units"),
        ({"n_heads": 64}, "heads of even size"),
        ({"dim": -64}, "dim is -64"),
        ({"dim": 64.0}, "dim is 64.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"n_layers": 10**400}, "n_layers is 1000"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_seq_len": None}, "max_seq_len is None"),
    ],
)
def test_impossible_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{**GQA, **change})


def test_vocab_size_must_be_known():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        Transformer(ModelArgs(**GQA))


@pytest.mark.parametrize(
    ("args", "hidden", "parameters"),
    [
        (PUBLISHED["7B"], 11008, 6_738_415_616),
        (PUBLISHED["13B"], 13824, 13_015_864_320),
        (PUBLISHED["70B"], 28672, 68_976_648_192),
    ],
)
def test_published_sizes_on_the_meta_device(args, hidden, parameters):
    """The numbers of parameters equal those of the published checkpoints. Nothing is allocated."""
    args = ModelArgs(**args, vocab_size=32000)
    assert args.ffn_hidden == hidden
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_model_py_is_short():
    assert len((ROOT / "llama" / "model.py").read_text().splitlines()) <= 250
